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
from .report import read_report as read_report, Report as Report
from .solve import integrate as integrate, Integrator as Integrator
from .study import (
    Fraction as Fraction,
    fraction as fraction,
    Outcome as Outcome,
    precision as precision,
    run_study as run_study,
    Study as Study,
)
from .types import names_of as names_of
