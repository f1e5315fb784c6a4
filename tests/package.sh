#!/bin/sh
# Build wheel and sdist, install the wheel with its diffusers extra in an empty environment, and run
# the demo there. The sdist must make the same wheel.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/tools"
"$folder/tools/bin/pip" install --quiet build
"$folder/tools/bin/python" -m build --outdir "$folder/dist" . >"$folder/build.log" 2>&1 || {
  tail -30 "$folder/build.log"
  exit 1
}
"$python" -m venv "$folder/empty"
"$folder/empty/bin/pip" install --quiet -c constraints.txt torch
"$folder/empty/bin/pip" install --quiet -c constraints.txt "$(ls "$folder"/dist/*.whl)[diffusers]"
cd "$folder"
for name in ray onnx onnxruntime selenium av peft pytest mkdocs; do
  if "$folder/empty/bin/python" -c "import $name" 2>/dev/null; then
    echo "the light environment has $name"
    exit 1
  fi
done
"$folder/empty/bin/truestep" --version
"$folder/empty/bin/truestep" demo
test -s demo-output/report.html
du -sh "$folder/empty" | cut -f1
