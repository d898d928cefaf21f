# Sourced in the checkout: $site gets its code, which runs from there without being installed.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
cp -r srds_fast profiling bench "$site/"
rm -rf "$site/bench/results"
cp -r kernels "$site/srds_fast/kernels"
# a folder `kernels` on the path would shadow another package
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
has_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }
refuse() { echo "$1" >&2 && exit 2; }
# begin_with PROFILER 'NAME OF ITS PRODUCT' VARIABLE WORKLOAD...: check that all is there; $to is where results go
begin_with() {
  [[ ${4:--} != -* ]] || refuse "What is to be profiled? Name a workload first: bash $0 digits"
  command -v "$1" >/dev/null ||
    refuse "There is no $1. It comes with the CUDA toolkit and alone as '$2'; name it in $3=/path/to/it."
  mkdir -p "${OUT:=profiles}"
  to="$(cd "$OUT" && pwd)/${NAME:-$4}"
}
