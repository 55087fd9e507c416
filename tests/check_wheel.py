"""Run by ``make wheel`` from a folder that the wheel was unpacked into: is all there that a user needs?"""

import subprocess
import sys
from pathlib import Path

import flash_llm

here = Path.cwd()
home = Path(flash_llm.__file__).parent
if home != here / "flash_llm":
    sys.exit(f"imported from {home}, not from the wheel in {here}")
missing = [name for name in flash_llm.__all__ if not hasattr(flash_llm, name)]
if missing:
    sys.exit(f"the wheel lacks {missing}")
if not (home / "py.typed").is_file() or not list((home / "kernels" / "csrc").glob("*.cu")):
    sys.exit("the wheel lacks py.typed or the kernels' sources")
if not (home / "capacity" / "efficiency.json").is_file():
    sys.exit("the wheel lacks the planner's efficiencies")
subprocess.run([sys.executable, "-m", "flash_llm", "--help"], check=True, stdout=subprocess.DEVNULL)
print(f"the wheel of flash-llm {flash_llm.__version__} is complete")
