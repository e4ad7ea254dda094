"""README's example runs and prints what README says it prints."""

import re
import subprocess
import sys
from pathlib import Path


README = (Path(__file__).parent.parent / "README.md").read_text()


def test_example_prints_what_is_said():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    said = re.search(r"prints `([^`]+)`", README)
    assert code is not None and said is not None
    run = subprocess.run(
        [sys.executable, "-c", code[1]], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == said[1]


def test_every_command_of_the_claims_table_names_a_file_that_exists():
    commands = re.findall(r"`pytest ([^`]+)`", README)
    assert commands
    root = Path(__file__).parent.parent
    for command in commands:
        for word in command.split():
            if word.startswith("tests/"):
                assert (root / word).exists(), word


def test_map_names_every_file():
    package = Path(__file__).parent.parent / "gradflow"
    for path in package.glob("*.py"):
        if path.name != "__init__.py":
            assert f"  {path.name} " in README, path.name
