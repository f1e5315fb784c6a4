#!/bin/sh
# Make an environment for real engines: setup.sh FOLDER PYTHON
#
# Wheels are pinned, and installed without what they ask for (CUDA builds of torch): what a run on a
# CPU imports is named here. torchvision's own wheel is for another torch build; its registration of
# compiled operators is emptied, since none is used, and torchaudio is a name that is imported only.
set -eu
folder=$1
python=$2
here=$(cd "$(dirname "$0")/../.." && pwd)
test -x "$folder/bin/python" || "$python" -m venv "$folder"
pip="$folder/bin/python -m pip install --quiet -c $here/constraints.txt"
$pip torch
$pip diffusers transformers accelerate safetensors sentencepiece protobuf
$pip einops imageio ftfy easydict peft pandas tqdm loguru modelscope
$pip --no-deps diffsynth==2.1.12 torchvision==0.28.0
# ComfyUI, where TRUESTEP_COMFYUI names it
$pip --no-deps torchsde trampoline comfy-kitchen kornia kornia_rs spandrel
$pip aiohttp yarl alembic SQLAlchemy psutil pydantic-settings av pillow scipy pyyaml
# HunyuanVideo needs none of these; Cosmos-Predict2 and xDiT, where variables name them, do
$pip --no-deps omegaconf antlr4-python3-runtime==4.9.3 iopath portalocker fvcore yacs tabulate
$pip --no-deps termcolor hydra-core nvidia-ml-py dill distvae yunchang beautifulsoup4 soupsieve
site=$("$folder/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
: > "$site/torchvision/_meta_registrations.py"
mkdir -p "$site/torchaudio"
echo '__version__ = "0"' > "$site/torchaudio/__init__.py"
