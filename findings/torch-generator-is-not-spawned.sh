#!/usr/bin/env bash
# A torch.Generator can be pickled, but not sent to a spawned process.
#
# A good engineer would guess that what `pickle.dumps` takes, `multiprocessing` with the "spawn" method takes too, and that an object
# that holds a random generator, such as a policy or a dataset, can therefore be an argument of a spawned process.
#
# With torch 2.13.0 (CPU, Python 3.11, Linux): `pickle.loads(pickle.dumps(generator))` gives the same numbers. As an argument of
# `multiprocessing.get_context("spawn").Process`, after `import torch`, the child raises while it unpickles its arguments:
#     RuntimeError: unable to resize file <filename not specified> to the right size: Invalid argument (22)
# and exits with code 1; the parent sees no exception. A tensor and a `torch.nn.Linear` arrive. PyTorch pickles a generator with its
# state as a tensor, and sends tensors to other processes by a file descriptor instead of by their bytes.
#
# So: pickle a generator by the bytes of its state (`get_state().numpy().tobytes()`).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.3.5" > /dev/null 2>&1
cat > "$folder/try.py" <<'PYTHON'
import multiprocessing
import pickle

import torch


def show(value, answers):
    answers.put(True)


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    copied = pickle.loads(pickle.dumps(generator))
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=copied))
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    codes = {}
    for name, value in {"tensor": torch.ones(3), "layer": torch.nn.Linear(2, 2), "generator": generator}.items():
        process = context.Process(target=show, args=(value, answers))
        process.start()
        process.join(60)
        codes[name] = process.exitcode
    print(codes)
    assert codes == {"tensor": 0, "layer": 0, "generator": 1}, codes
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/try.py" 2> "$folder/errors"
grep -q "unable to resize file" "$folder/errors"
echo "torch 2.13.0: a generator is pickled, but a spawned process cannot receive it"
