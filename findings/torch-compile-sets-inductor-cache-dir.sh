#!/usr/bin/env bash
# torch 2.13.0: the first compilation writes TORCHINDUCTOR_CACHE_DIR into the environment of the process.
#
# TORCHINDUCTOR_CACHE_DIR is where a user says that compiled kernels are kept. One would expect that PyTorch only reads it. But any use of
# `torch.compile`, even with `backend="eager"`, imports TorchInductor's runtime, which sets the variable to its default, a folder under
# /tmp that does not survive a restart. `import torch` alone does not. So code that runs after a first compilation cannot tell a choice of the user from
# the default: `os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", …)` has no effect any more, and child processes inherit the value. A library that wants
# another default has to set the variable before anything compiles, or to compare it with PyTorch's default.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# On machines whose index has GPU builds this is a large download.
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

cat > "$folder/run.py" <<'PY'
import os
import subprocess
import sys

NAME = "TORCHINDUCTOR_CACHE_DIR"
import torch

after_import = os.environ.get(NAME)
torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
after_compile = os.environ.get(NAME)
os.environ.setdefault(NAME, "/chosen/by/a/library")
child = subprocess.run(
    [sys.executable, "-c", f"import os; print(os.environ.get('{NAME}'))"],
    capture_output=True, text=True, check=True,
).stdout.strip()
print(f"after `import torch`: {after_import}; after a compilation with the backend eager: {after_compile}; in a child: {child}")
assert after_import is None
assert after_compile is not None and "torchinductor" in after_compile
assert child == after_compile
PY
env -u TORCHINDUCTOR_CACHE_DIR "$folder/venv/bin/python" -W ignore "$folder/run.py"
