#!/usr/bin/env bash
# Record tests/data/nsys-*.sqlite anew: calls of digits on a CPU, by a real Nsight Systems, on Debian 12.
#
#     PYTHON=.venv/bin/python bash profiling/make_fixture.sh
#
# nsys-eager is run wave by wave; nsys-graph records its waves and replays them, coarse rows as network calls of their
# own. Beside each goes, as JSON, what its last call reported of itself; profiling/example.png is drawn of the
# first. tests/test_profiling_report.py has the times of its last network calls, taken down by hand: they change.
# The profiler is Debian's (non-free, 2022.4). It is unpacked, not installed, as its package wants a GPU's driver. The
# apt sources that are configured are taken, with non-free beside main. It shows no ranges of the Python package nvtx
# 0.2.12 and later; 0.2.11 is taken, which lacks two methods of a domain.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHON=${PYTHON:-python3}

apt-get indextargets --format '$(REPO_URI) $(CODENAME)' \
  'Created-By: Packages' 'Component: main' 'Label: Debian' 'Codename: bookworm' | sort -u | head -n 1 |
  while read -r uri codename; do
    echo "deb $uri $codename main non-free"
  done >"$work/sources.list"
[ -s "$work/sources.list" ] || { echo "apt has no source for Debian bookworm. Configure one." >&2 && exit 2; }
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
apt=(apt-get -q -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$work/lists"
  -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root)
"${apt[@]}" update
(cd "$work" && "${apt[@]}" download nsight-systems nsight-systems-target libssh-4)
for package in "$work"/*.deb; do
  dpkg -x "$package" "$work/root"
done
host="$work/root/usr/lib/nsight-systems/host-linux-x64"
target="$work/root/usr/lib/x86_64-linux-gnu/nsight-systems/target-linux-x64"
# where the program looks for what turns its records into a report
ln -s "$host" "$target/../host-linux-x64"

"$PYTHON" -m pip install -q --no-deps --target "$work/nvtx" nvtx==0.2.11
cat >"$work/nvtx/sitecustomize.py" <<'PYTHON'
from nvtx._lib import Domain, pop_range, push_range

Domain.push_range = lambda self, attributes: push_range(attributes, self.handle)
Domain.pop_range = lambda self: pop_range(self.handle)
PYTHON

record() { # name, arguments of profiling.run...
  local name=$1
  shift
  LD_LIBRARY_PATH="$host:$work/root/usr/lib/x86_64-linux-gnu" PYTHONPATH="$work/nvtx" OMP_NUM_THREADS=1 \
    OUT="$work/out" NAME="$name" NSYS="$target/nsys" bash profiling/nsys.sh digits "$@" --json "$work/$name.json"
  mkdir -p tests/data
  cp "$work/$name.json" tests/data/
  cp "$work/out/$name.sqlite" tests/data/
  "$PYTHON" - "tests/data/$name.sqlite" <<'PYTHON'
"""Keep what the report reads, and nothing that tells of the machine."""
import sqlite3
import sys

database = sqlite3.connect(sys.argv[1], isolation_level=None)
for kind, name in database.execute("SELECT type, name FROM sqlite_master WHERE type IN ('table', 'view')").fetchall():
    if name not in ("NVTX_EVENTS", "StringIds"):
        database.execute(f"DROP {kind} {name}")
database.execute("DELETE FROM StringIds WHERE id NOT IN (SELECT textId FROM NVTX_EVENTS WHERE textId IS NOT NULL)")
database.execute("VACUUM")
PYTHON
}
record nsys-eager --steps 25
record nsys-graph --steps 10 --calls 2 --engine graph --overlap streams
"$PYTHON" -m profiling.report tests/data/nsys-eager.sqlite --png profiling/example.png
