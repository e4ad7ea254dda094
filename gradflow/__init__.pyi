from . import (
    collapse as collapse,
    datasets as datasets,
    experiments as experiments,
    manifolds as manifolds,
    models as models,
    plot as plot,
    solvers as solvers,
    theory as theory,
)
from .audit import Audit as Audit
from .checks import (
    Certificate as Certificate,
    check_descent as check_descent,
    check_energy as check_energy,
    check_initializer as check_initializer,
    check_manifold as check_manifold,
)
from .critical import (
    classify as classify,
    CriticalPoint as CriticalPoint,
    describe as describe,
    KIND as KIND,
    RULE as RULE,
)
from .descent import Descent as Descent, RESULTS as RESULTS, Solution as Solution
from .em import (
    AbstractIteration as AbstractIteration,
    AlternatingMaximization as AlternatingMaximization,
    ExpandedMaximization as ExpandedMaximization,
    ExpectationMaximization as ExpectationMaximization,
    Squarem as Squarem,
)
from .factor_analysis import FactorAnalysis as FactorAnalysis
from .flow import AbstractFlow as AbstractFlow, GradientFlow as GradientFlow
from .initial import (
    BalancedInit as BalancedInit,
    GaussianInit as GaussianInit,
    GaussianLike as GaussianLike,
    LowRankInit as LowRankInit,
    NearPoint as NearPoint,
    OrthogonalInit as OrthogonalInit,
    OrthonormalBalancedInit as OrthonormalBalancedInit,
    section7_widths as section7_widths,
)
from .iterate import iterate as iterate, Iterator as Iterator
from .moments import Moments as Moments
from .precision import precision as precision
from .report import read_report as read_report, Report as Report
from .sequential import (
    Decided as Decided,
    Narrower as Narrower,
    run_until as run_until,
)
from .solve import integrate as integrate, Integrator as Integrator
from .statistics import (
    Fraction as Fraction,
    fraction as fraction,
    Paired as Paired,
    paired as paired,
    strata as strata,
)
from .store.export import to_xarray as to_xarray
from .store.folder import Store as Store
from .store.merging import merge as merge
from .study import (
    Outcome as Outcome,
    run_studies as run_studies,
    run_study as run_study,
    Study as Study,
    without_points as without_points,
)
from .study_checks import (
    check_inspection as check_inspection,
    check_study as check_study,
)
from .types import names_of as names_of
from .verifying import verify_studies as verify_studies
