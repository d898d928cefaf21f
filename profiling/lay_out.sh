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
