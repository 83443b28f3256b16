"""Runs a test file with the interpreter that scripts/test made ($ANTIPHON_PYTHON), else with this one."""
import os
import sys

python = os.environ.get("ANTIPHON_PYTHON") or sys.executable
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
os.execv(python, [python, *sys.argv[1:]])
