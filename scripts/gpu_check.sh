#!/usr/bin/env bash
# What anybody with a GPU runs first: the tests marked gpu, a short run of each model on 1 and 2 GPUs, the benchmarks.
# One report is left. On a machine without a GPU the runs are of one and two ranks on its CPU, and narrow.
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
  last="$(tail -n 1 "$folder/$name.log" | tr '|' '/' | cut -c 1-160)"
  say "| $name | $status | $((SECONDS - began)) | ${last//"$folder/"/} |"
}

: > "$report"
say "# gpu_check, $(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"
say
say '```'
"$python" - << 'PYTHON' | tee -a "$report"
import os, platform, torch
print("torch", torch.__version__, "| python", platform.python_version(), "| cores", os.cpu_count())
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

check gpu-tests "$python" -m pytest -q -n 0 -m gpu tests

for model in $models; do
  kind="$(sed -n 's/^kind: *\([a-z]*\).*/\1/p' "configs/model/$model.yaml")"
  size=()
  case "$kind" in
    language) data=(data=pydocs batch_size=8) ;;
    *) data=(data=digits batch_size=16) ;;
  esac
  if [ "$gpus" = 0 ]; then
    grep -q '^width:' "configs/model/$model.yaml" && [ "$kind" = vision ] && size=(model.width=8)
    case "$model" in swin*) size=(model.width=32) ;; esac
  fi
  for ranks in 1 2; do
    [ "$gpus" = 1 ] && [ "$ranks" = 2 ] && continue
    place=(num_gpus="$ranks")
    [ "$gpus" = 0 ] && place=(num_gpus=0 cpu_procs="$ranks")
    check "$model-$ranks" "$python" train.py "${data[@]}" model="$model" "${size[@]}" optim=koala-m max_steps=6 log_every=2 \
      logger=none "output_root=$folder/runs" "data_root=$folder/data" "${place[@]}" rerun=true
  done
done

for benchmark in $benchmarks; do
  arguments=()
  [ "$benchmark" != ranks ] && arguments=(--output "$folder/$benchmark.json")
  case "$benchmark-$gpus" in
    optimizers-0) continue ;;  # scripts/benchmark_optimizers.py has a page of its own for CPUs
    optimizers-*) arguments+=(--device cuda) ;;
    training-0) arguments+=(--width 8 --repeats 1 --precision fp32) ;;
    filter-0) arguments+=(--width 8 --repeats 1 --steps 10) ;;
  esac
  check "benchmark-$benchmark" "$python" "scripts/benchmark_$benchmark.py" "${arguments[@]}"
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
