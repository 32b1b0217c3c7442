#!/usr/bin/env bash
# torch.load(mmap=True) takes the bytes of a compressed entry for numbers.
#
# A `.pt` file is a zip archive, and tools that repack archives compress their entries. A good engineer would guess that `torch.load`
# either reads such a file or refuses it, with and without `mmap=True`.
#
# With torch 2.13.0 (CPU, Python 3.11, Linux): `torch.load(path)` reads a file with a repacked entry right; `torch.load(path, mmap=True)` returns
# tensors of the right shape and other numbers, without an error or a warning: the compressed bytes, and what follows them in the file.
# Nor are the checksums of the entries compared, in either way: a number that was changed in the file is returned as it is.
#
# So: map a file only if `zipfile` says that all its entries are stored, and verify their checksums yourself (those that are not zero:
# `torch.serialization.set_crc32_options(False)` writes zeros).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.3.5" > /dev/null 2>&1
cat > "$folder/try.py" <<'PYTHON'
import sys
import zipfile

import torch

folder = sys.argv[1]
numbers = torch.arange(4096.0)
torch.save({"numbers": numbers, "others": torch.ones(100_000)}, f"{folder}/plain.pt")


def repack(name, compression):
    with zipfile.ZipFile(f"{folder}/plain.pt") as plain, zipfile.ZipFile(f"{folder}/{name}", "w") as new:
        for entry in plain.infolist():
            content = plain.read(entry)
            is_data = entry.filename.endswith("/data/0")
            kind = compression if is_data else zipfile.ZIP_STORED
            new.writestr(entry.filename, content, compress_type=kind)
    return f"{folder}/{name}"


path = repack("packed.pt", zipfile.ZIP_DEFLATED)
read = torch.load(path, weights_only=True)["numbers"]
mapped = torch.load(path, weights_only=True, mmap=True)["numbers"]
print("read right:", torch.equal(read, numbers), "mapped right:", torch.equal(mapped, numbers), tuple(mapped.shape))
assert torch.equal(read, numbers)
assert mapped.shape == numbers.shape and not torch.equal(mapped, numbers)

# One number is changed, its checksum is not.
data = bytearray(open(f"{folder}/plain.pt", "rb").read())
at = data.index(numbers.numpy().tobytes()) + 4 * 7
data[at : at + 4] = torch.tensor([-1.0]).numpy().tobytes()
open(f"{folder}/changed.pt", "wb").write(data)
for mmap in (False, True):
    changed = torch.load(f"{folder}/changed.pt", weights_only=True, mmap=mmap)["numbers"]
    print("mmap", mmap, "number 7 is", float(changed[7]))
    assert float(changed[7]) == -1.0
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/try.py" "$folder"
echo "torch 2.13.0: mapping compressed entries gives other numbers, and checksums are not compared"
