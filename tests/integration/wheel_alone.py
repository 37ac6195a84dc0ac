"""A wheel in an environment of its own, with no compiler on the path: does it train?

    make wheel && python tests/integration/wheel_alone.py dist/penstock-*.whl

Makes an environment with this Python, installs the wheel and what it needs, and runs the demo's job
there with a path of that environment's programs alone. Prints one JSON object; exits 1 where it
does not train. Not a test of CI: it installs torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "cmake", "ninja", "nvcc")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--steps", type=int, default=700)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        venv.create(home / "env", with_pip=True)
        programs = home / "env" / "bin"
        install = [str(programs / "python"), "-m", "pip", "install", "--quiet"]
        constraints = ["-c", str(ROOT / "constraints.txt")]
        subprocess.run([*install, *constraints, str(arguments.wheel.resolve())], check=True)
        shutil.copy(ROOT / "jobs" / "synthetic.yaml", home)
        alone = {**os.environ, "PATH": str(programs)}
        found = [name for name in COMPILERS if shutil.which(name, path=alone["PATH"])]
        steps = f"training.max_steps={arguments.steps}"
        command = [str(programs / "penstock"), "train", "synthetic.yaml", "--out", "run"]
        done = subprocess.run(
            [*command, "--set", steps],
            cwd=home,
            env=alone,
            capture_output=True,
            text=True,
            check=False,
        )
        trained = done.returncode == 0 and not found
        summary = json.loads((home / "run" / "summary.json").read_text()) if trained else {}
    print(
        json.dumps({
            "wheel": arguments.wheel.name,
            "python": sys.version.split()[0],
            "compilers_on_path": found,
            "exit": done.returncode,
            "steps": summary.get("steps", summary.get("step")),
            "auc": summary.get("evaluation", summary).get("auc"),
            "said": "" if trained else (done.stdout + done.stderr)[-2000:],
        })
    )
    sys.exit(0 if trained else 1)


if __name__ == "__main__":
    main()
