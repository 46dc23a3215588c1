#!/usr/bin/env bash
# Makes an environment for Flower and runs two rounds of three sites in it, first in Flower's
# simulation and then over its server with three nodes, all on this machine.
#   launch/flower/check.sh [WORK]      WORK: folder for environment and results (default: temporary)
# PYTHON (default: python) must have bioscan_xla; the environment takes its libraries from there,
# behind those that Flower pins. Flower's telemetry is off.
set -euo pipefail
export FLWR_TELEMETRY_ENABLED=0 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0
app=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$app/../.." && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work"
work=$(cd "$work" && pwd)
python=${PYTHON:-python}
if [ ! -x "$work/venv/bin/flower-superlink" ]; then
  "$python" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet "flwr[simulation]==1.42.*"
fi
"$python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
  > "$("$work/venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/libraries.pth"
export PATH="$work/venv/bin:$PATH" PYTHONPATH="$root:$app"
export FLWR_HOME="$work/flwr"
rm -rf "$work/data" "$work/simulated" "$work/served" "$FLWR_HOME"
mkdir -p "$work/data" "$FLWR_HOME"
python - "$work/data" <<'PY'
import sys
import pyarrow.parquet as pq
from bioscan_xla.sample import simulate

table = simulate(240)
for number in range(3):
    rows = [row for row in range(len(table)) if row % 24 % 3 == number]
    pq.write_table(table.take(rows), f"{sys.argv[1]}/site{number}.parquet")
PY
run() {  # connection, folder for the result
  cat > "$work/run.toml" <<TOML
sites = 3
rounds = 2
wait-seconds = 900.0
data = "$work/data"
output = "$2"
options = '{"model": "bioscan-small", "device": "cpu", "learning_rate": 0.003, "batch_size": 16}'
TOML
  flwr run "$app" "$1" --run-config "$work/run.toml"
}
cat > "$FLWR_HOME/config.toml" <<TOML
[superlink]
default = "simulated"

[superlink.simulated]
address = "127.0.0.1:29090"
insecure = true
options.num-supernodes = 3
options.backend.client-resources.num-cpus = 1
options.backend.client-resources.num-gpus = 0.0

[superlink.served]
address = "127.0.0.1:29100"
insecure = true
TOML
started=()
trap '[ ${#started[@]} -eq 0 ] || kill "${started[@]}" 2>/dev/null || true' EXIT
link() {  # port, further options: a SuperLink on the loopback
  flower-superlink --insecure --host 127.0.0.1 --port "$1" \
    --disable-runtime-dependency-installation "${@:2}" > "$work/link-$1.log" 2>&1 &
  started+=($!)
  for _ in $(seq 120); do
    python -c "import socket; socket.create_connection(('127.0.0.1', $1), 1)" 2>/dev/null && return
    sleep 1
  done
  cat "$work/link-$1.log"; exit 1
}
wait_for() {  # folder: until its second round is there
  for _ in $(seq 900); do
    [ -d "$1/round2" ] && break
    sleep 1
  done
  [ -d "$1/round2" ] || { tail -n 60 "$work"/link-*.log "$work"/node-*.log; exit 1; }
  python - "$1/round2" <<'PY'
import json
import sys
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.training.classifier import load_classifier

model = load_classifier(sys.argv[1], open_device("cpu", "float32"))
told = json.load(open(f"{sys.argv[1]}/sites.json"))
assert len(told["sites"]) == 3 and not told["left_out"], told
print(sys.argv[1], "classes", model.labels.num_classes, "of", [s["site"] for s in told["sites"]])
PY
}

echo "== simulation: three sites on Flower's own Ray"
link 29090 --simulation
run simulated "$work/simulated"
wait_for "$work/simulated"

echo "== server: a SuperLink and three SuperNodes"
link 29100
for number in 0 1 2; do
  site="site='site$number' train='$work/data/site$number.parquet' work='$work/served/sites/$number'"
  flower-supernode --insecure --superlink 127.0.0.1:29100 --port $((29101 + number)) \
    --node-config "$site" > "$work/node-$number.log" 2>&1 &
  started+=($!)
done
run served "$work/served"
wait_for "$work/served"
for part in adapter/adapter_model.safetensors heads.safetensors; do
  cmp "$work/simulated/round2/$part" "$work/served/round2/$part"
done
echo "simulation and server gave the same model, byte for byte"
