"""Check the types of the package (mypy), and its modules against the conventions of Transformers' files (mlinter).

mypy sees the folders as the package that they are installed as.

mlinter applies its rules by file name (`modeling_*.py`, ...) and looks for a model's config beside the model, so
`mlinter modeling` would pass over the operators and never see the config. Here each module is shown to it in one flat
folder under a name that it checks.

A rule is waived where it does not fit by a comment `# trf-ignore: TRF000 the reason` on the line or on the one above.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mlinter import DEFAULT_ENABLED_TRF_RULES, analyze_file


FOLDERS = ("commands", "configuration", "modeling", "starter", "tokenization", "training")
MAX_WAIVED_RULES = 2
WAIVER = re.compile(r"#\s*trf-ignore:\s*(TRF\d+)(.*)", re.IGNORECASE)
LICENSE_HEADER = "TRF028"


def check_conventions(root: Path, flat: Path) -> list[str]:
    """Return mlinter's findings on the package below `root`, shown to it in the empty folder `flat`."""
    names = {}
    for folder in FOLDERS:
        for path in sorted(root.glob(f"{folder}/**/[!_]*.py")):
            name = path.name if path.name.startswith(f"{folder}_") else f"{folder}_{path.name}"
            names[path] = name
            (flat / name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    if not names:
        return [f"{root}: no module found in {', '.join(FOLDERS)}"]

    findings = []
    for path, name in names.items():
        # the license header is asked for where mlinter itself would look
        rules = DEFAULT_ENABLED_TRF_RULES - ({LICENSE_HEADER} if name != path.name else set())
        for violation in analyze_file(flat / name, path.read_text(encoding="utf-8"), rules):
            findings.append(f"{path.relative_to(root)}:{violation.line_number}: {violation.message}")
    return findings


def check_types(root: Path, folder: Path) -> list[str]:
    """Return mypy's findings on the package below `root`, laid out in the empty `folder` as it is installed."""
    package = folder / "hf_reformer"
    shutil.copytree(root / "hf_reformer", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FOLDERS:
        shutil.copytree(root / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml")]
    cache = ["--cache-dir", str(root / ".mypy_cache"), "--no-error-summary"]
    found = subprocess.run([*command, *cache, "-p", "hf_reformer"], cwd=folder, capture_output=True, text=True)
    return (found.stdout + found.stderr).splitlines()


def check_waivers(root: Path) -> list[str]:
    """Return what is wrong with the waivers: one without a reason, or too many waived rules."""
    findings, waived = [], set()
    for path in sorted(path for folder in FOLDERS for path in root.glob(f"{folder}/**/*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if match := WAIVER.search(line):
                rule, reason = match.groups()
                waived.add(rule.upper())
                if not re.search(r"\w", reason):
                    findings.append(f"{path.relative_to(root)}:{number}: {rule} is waived without a reason")
    if len(waived) > MAX_WAIVED_RULES:
        findings.append(f"at most {MAX_WAIVED_RULES} rules may be waived, not {', '.join(sorted(waived))}")
    return findings


def main() -> int:
    """Print the findings on the package in the working directory; return 1 when there are any."""
    root = Path.cwd()
    with TemporaryDirectory() as flat, TemporaryDirectory() as installed:
        findings = check_conventions(root, Path(flat)) + check_waivers(root)
        if (root / "hf_reformer").is_dir():
            findings += check_types(root, Path(installed))
    print("\n".join(findings) or "mlinter and mypy: no findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
