#!/usr/bin/env bash
# What to run first on a machine with a GPU, most important first, each with a limit; nothing stops what follows:
#   bash benchmarks/first_gpu_run.sh            # about 10 minutes; logs and JSON in benchmarks/results/
cd "$(dirname "$0")/.." || exit 1
mkdir -p benchmarks/results
limited() { local seconds=$1 log=benchmarks/results/$2.log; shift 2; timeout "$seconds" "$@" > "$log" 2>&1; echo "$? $* ($log)"; tail -n 4 "$log"; }
limited 150 gpu-attention  python -m pytest -m gpu -n 0 -q -x tests/engine/test_gpu_attention.py -k "sdpa and kernel or stored or key_too_many or fused_when_loaded"
limited 200 gpu-lumina     python -m benchmarks.gpu --models lumina --seconds 160
limited 120 gpu-decoders   python -m pytest -m gpu -n 0 -q tests/engine/test_gpu_attention.py -k "recording or joined or family"
limited 60  gpu-fast       python run.py device=cuda decoder=scd limit=12 batch_size=1 evaluation=none runs_dir=runs/gpu-fast
limited 60  gpu-eager      python run.py device=cuda decoder=scd limit=12 batch_size=1 evaluation=none runs_dir=runs/gpu-eager runtime=eager
limited 300 gpu-all        python -m pytest -m gpu -n 0 -q
