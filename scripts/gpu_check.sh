#!/usr/bin/env bash
# What anybody with a GPU runs first: the tests marked gpu, a short run of each model on 1 and 2 GPUs, the benchmarks.
# One report is left. On a machine without a GPU the runs are narrow, on one rank of its CPU, some on two.
#   bash scripts/gpu_check.sh                 report: outputs/gpu-check/report.md
#   bash scripts/gpu_check.sh DIR             report: DIR/report.md
#   MODELS="mlp tiny-lstm" BENCHMARKS= bash scripts/gpu_check.sh DIR     some models, no benchmarks
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${1:-outputs/gpu-check}"
python="${PYTHON:-.venv/bin/python}"
models="${MODELS:-$(basename -s .yaml configs/model/*.yaml)}"
benchmarks="${BENCHMARKS-optimizers filter training ranks}"
mkdir -p "$folder"
report="$folder/report.md"
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
failed=0

say() { echo "$@" | tee -a "$report"; }

# check NAME COMMAND...: a row of the report with status and seconds; what the command said is in FOLDER/NAME.log.
check() {
  local name="$1" began=$SECONDS status=ok
  shift
  "$@" > "$folder/$name.log" 2>&1 || { status="**failed** ($?)"; failed=1; }
  local last
  last="$(grep -v '^ *$' "$folder/$name.log" | tail -n 1 | tr '|' '/' | cut -c 1-160)"
  say "| $name | $status | $((SECONDS - began)) | ${last//"$folder/"/} |"
}

: > "$report"
say "# gpu_check, $(date -u +%FT%TZ), commit $(git -c safe.directory="$PWD" rev-parse --short HEAD 2> /dev/null || echo unknown)"
say
say '```'
"$python" - << 'PYTHON' | tee -a "$report"
import os, platform, torch
print("torch", torch.__version__, "| python", platform.python_version(), "| cores", os.cpu_count())
load = os.getloadavg()[0]
print(f"load {load:.1f}" + (": shared with other work, so that no time below is a measurement" if load > 1 else ""))
for index in range(torch.cuda.device_count()):
    found = torch.cuda.get_device_properties(index)
    print(f"cuda:{index}", found.name, f"{found.total_memory / 2**30:.0f} GiB", f"sm_{found.major}{found.minor}")
if not torch.cuda.is_available():
    print("no GPU: what follows ran on the CPU, and says nothing of one")
PYTHON
say '```'
say
say "| what | status | seconds | its last line |"
say "| --- | --- | ---: | --- |"

[ "$gpus" = 0 ] || check gpu-tests "$python" -m pytest -q -n 0 -m gpu tests # they skip themselves elsewhere

# Overrides of a model's short run; narrow without a GPU.
settings() {
  case "$1" in
    dcgan) echo data=digits data.resize=16 "data.mean=[127.5]" "data.std=[127.5]" model.features=random model.samples=80 optim=adam ;;
    *lstm | *transformer | gpt*) echo data=pydocs batch_size=8 select=last schedule=constant optim=koala-m ;;
    vit*) echo data=digits data.resize=32 batch_size=16 optim=koala-m ;;
    *) echo data=digits batch_size=16 optim=koala-m ;;
  esac
  grep -q "^pretrained:" "configs/model/$1.yaml" && echo model.pretrained=null # no download
  [ "$gpus" = 0 ] || return
  case "$1" in
    gpt1*) echo data.bptt=8 model.width=32 model.heads=2 model.feedforward=64 ;;
    gpt-small | *lstm | *transformer) echo data.bptt=8 model.width=32 ;;
    swin*) echo model.width=32 ;;
    vit*) echo model.width=48 ;;
    mlp) ;;
    *) echo model.width=8 ;;
  esac
}

# train NAME MODEL RANKS OVERRIDE...: six steps, evaluated and saved.
train() {
  local name="$1" model="$2" ranks="$3" place=(num_gpus="$3") chosen
  shift 3
  [ "$gpus" = 0 ] && place=(num_gpus=0 cpu_procs="$ranks")
  read -ra chosen <<< "$(settings "$model" | tr '\n' ' ')"
  check "$name" "$python" train.py "${chosen[@]}" model="$model" max_steps=6 log_every=2 logger=none "${place[@]}" \
    "output_root=$folder/runs" "data_root=$folder/data" rerun=true "$@"
}

for model in $models; do
  train "$model-1" "$model" 1
  case "$gpus-$model" in
    *-dcgan | 1-*) ;; # trains on one rank; there is one GPU
    0-mlp | 0-resnet10 | 0-tiny-lstm) train "$model-2" "$model" 2 ;;
    0-*) ;; # without a GPU, two ranks for one model of each kind
    *) train "$model-2" "$model" 2 ;;
  esac
done
case "$gpus" in
  0) train mlp-fsdp mlp 2 strategy=fsdp checkpoint_async=true ;;
  *)
    train resnet18-compiled resnet18 1 precision=bf16 compile=true
    train resnet18-tf32 resnet18 1 precision=tf32
    [ "$gpus" -gt 1 ] && train resnet18-fsdp resnet18 2 strategy=fsdp precision=bf16
    ;;
esac

for benchmark in $benchmarks; do
  arguments=()
  [ "$benchmark" != ranks ] && arguments=(--output "$folder/$benchmark.json")
  case "$benchmark-$gpus" in
    optimizers-0) arguments+=(--model tiny-lstm --repeats 3 --threads 1) ;;
    optimizers-*) arguments+=(--device cuda) ;;
    training-0) arguments+=(--width 8 --repeats 1 --precision fp32 --threads 1) ;;
    filter-0) arguments+=(--width 8 --repeats 1 --steps 20 --threads 1) ;; # 20: so that all words of the tokens occur
    ranks-0) arguments+=(--ranks 2 --rounds 3) ;;
  esac
  check "benchmark-$benchmark" "$python" "scripts/benchmark_$benchmark.py" "${arguments[@]}"
done
for benchmark in $benchmarks; do
  say
  say "## benchmark_$benchmark"
  say
  say '```'
  # Without what torch's profiler, progress bars and empty lines add.
  sed "s|$folder/||" "$folder/benchmark-$benchmark.log" | grep -v "Warning\|^USDT\|^ERROR:.*DeviceProperties\|^Generating\|^decoding\|^ *$" |
    tail -n 60 | tee -a "$report"
  say '```'
done

say
say "## Runs: median milliseconds a step, and where the seconds went"
say
"$python" - "$folder/runs" << 'PYTHON' | tee -a "$report"
import sys
from pathlib import Path
from koala import records

print("| run | ranks | device | backend | ms a step | start, train, eval, save (s) | peak memory (MB) |")
print("| --- | ---: | --- | --- | ---: | --- | ---: |")
for path in sorted(Path(sys.argv[1]).glob("*/*/*/*/seed1/record.json")):
    record = records.read_record(path.parent)
    for part in record.get("segments", []):
        ms = "" if part["step_ms"] is None else f"{part['step_ms']:.1f}"
        seconds = ", ".join(f"{part['seconds'][phase]:.1f}" for phase in ("start", "train", "eval", "save"))
        print(f"| {record['name']} | {part['ranks']} | {part['device']} | {part['backend']} | {ms} | {seconds} "
              f"| {record['peak_memory_bytes'] / 1e6:.0f} |")
PYTHON
echo
echo "$report"
exit "$failed"
