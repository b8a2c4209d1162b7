#!/usr/bin/env bash
# Sets up the development environment, one stage per call; the Makefile decides which stages are stale.
#   setup.sh packages   .venv with the packages of requirements.lock
#   setup.sh build      csrc built in place, the package installed editable
#   setup.sh browser    Chromium for the tests of report.html, if there is none and root can install it
#   setup.sh sglang     .venv-sglang with SGLang, the rollout server
# An interrupted stage is repeated by the next call.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
packages | build | browser) readonly venv=.venv ;;
sglang) readonly venv=.venv-sglang ;;
*) echo "usage: tools/setup.sh packages|build|browser|sglang" >&2 && exit 1 ;;
esac
readonly venv_python=$venv/bin/python
pip_install=("$venv_python" -m pip install --disable-pip-version-check)
# Compiling thousands of .pyc files that are never imported costs more than it saves.
pip_install_many=("${pip_install[@]}" --progress-bar off --no-compile)

fail() {
    echo "setup: $*" >&2
    exit 1
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

make_venv() {
    "$venv_python" -m pip --version >/dev/null 2>&1 && return
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "$PYTHON is not Python 3.11 or newer; name one: make setup PYTHON=python3.11"
    # Without ensurepip (Debian's python3-venv) a venv has no pip.
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$PYTHON cannot make a virtual environment; on Debian: apt-get install python3-venv"
    "$PYTHON" -m venv --clear "$venv"
}

# pip writes INSTALLER last: without it the package is incomplete, but pip considers it installed.
forget_unfinished_packages() {
    find "$venv/lib" -maxdepth 3 -name '*.dist-info' ! -exec test -e '{}/INSTALLER' ';' -prune -exec rm -r '{}' +
}

install_packages() {
    forget_unfinished_packages
    "${pip_install_many[@]}" -r requirements.lock
    if has_nvidia_gpu; then
        "$venv_python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
            echo "setup: there is an NVIDIA GPU, but pip's configuration gave a CPU build of torch" >&2
    fi
}

build_extensions() {
    command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler; on Debian: apt-get install build-essential"
    "$venv_python" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' \
        2>/dev/null || fail "Python.h is missing; on Debian: apt-get install python3-dev"
    "${pip_install[@]}" --quiet --no-build-isolation --no-deps -e .
    # The training process imports 4000 modules. Import them once and keep their bytecode, also where
    # PYTHONDONTWRITEBYTECODE is set: without it every process of every run compiles them again, 10 s each.
    env -u PYTHONDONTWRITEBYTECODE "$venv_python" -W ignore -c \
        'import megatron_bicc.train, megatron_bicc.report.page, scipy.stats, hypothesis, pytest, xdist, tensorboard'
}

install_sglang() {
    local locked=requirements-sglang.lock
    forget_unfinished_packages
    if has_nvidia_gpu; then
        # SGLang pins its kernels, which pin torch.
        "${pip_install_many[@]}" "$(grep -E '^sglang==' $locked)"
        return
    fi
    # only torch is installed with its dependencies: a CPU build has none, a CUDA build many
    "${pip_install_many[@]}" "$(grep -oE '^torch==[^ ]+' $locked)" --constraint $locked
    "${pip_install_many[@]}" --no-deps -r $locked
    local packages
    packages=$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp -R tools/sglang_cpu/sgl_kernel tools/sglang_cpu/torchvision_operators.py "$packages/"
    echo "import torchvision_operators" >"$packages/torchvision_operators.pth"
    # imports once what a server imports: checks that it works, and compiles it
    env -u PYTHONDONTWRITEBYTECODE SGLANG_USE_CPU_ENGINE=1 "$venv_python" -W ignore -c \
        'import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler'
}

install_browser() {
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        if command -v "$name" >/dev/null; then return; fi
    done
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        { apt-get -o Acquire::Retries=3 update --quiet &&
            DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=3 install --quiet --yes \
                --no-install-recommends chromium fonts-dejavu-core; } && return
    fi
    # Other tests do not need it; those that do are skipped with this reason.
    echo "setup: no Chromium: report.html is not tested in a browser; on Debian: apt-get install chromium" >&2
}

case "$1" in
packages)
    make_venv
    install_packages
    ;;
build) build_extensions ;;
browser) install_browser ;;
sglang)
    make_venv
    install_sglang
    ;;
esac
