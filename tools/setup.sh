#!/usr/bin/env bash
# Creates .venv with mmembed in it, or reuses it: tools/setup.sh [EXTRAS]   (EXTRAS such as "dev"; none by default)
# Installs again only when pyproject.toml, constraints.txt or the extras have changed.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}

die() { echo "mmembed: $*" >&2; exit 1; }

# Debian packages, where this user may install them; otherwise one sentence that says what to type.
apt_install() {
    local as=""
    [ "$(id -u)" = 0 ] || as="sudo -n"
    if command -v apt-get >/dev/null && { [ -z "$as" ] || sudo -n true 2>/dev/null; }; then
        echo "mmembed: installing $*"
        { $as apt-get install -y -q "$@" || { $as apt-get update -q && $as apt-get install -y -q "$@"; }; } >/dev/null 2>&1 && return 0
    fi
    return 1
}

# Its programs alone, beside Python's: the package itself would start a daemon that listens.
unpack_prometheus() {
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
    local folder; folder=$(mktemp -d)
    echo "mmembed: fetching prometheus"
    ( cd "$folder" && { apt-get download -q prometheus || { apt-get update -q && apt-get download -q prometheus; } } >/dev/null 2>&1 &&
        dpkg -x prometheus_*.deb . ) && cp "$folder"/usr/bin/prom{etheus,tool} .venv/bin/
    local done=$?
    rm -rf "$folder"
    return $done
}

# What some tests want beside Python; without it they are skipped.
programs() {
    PATH="$PATH:/sbin" ldconfig -p 2>/dev/null | grep libheif.so >/dev/null || apt_install libheif1 ||
        echo "mmembed: without libheif the tests of HEIC are skipped (apt-get install libheif1)"
    command -v chromium >/dev/null || apt_install chromium ||
        echo "mmembed: without Chromium the tests of the demo's page are skipped (apt-get install chromium)"
    { command -v promtool || [ -x .venv/bin/promtool ]; } >/dev/null || unpack_prometheus ||
        echo "mmembed: without Prometheus the tests of the alerts are skipped (apt-get install prometheus)"
}

suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }

find_python() {
    for p in "${PYTHON:-}" python3 python3.12 python3.11 python3.13 python3.14; do
        [ -n "$p" ] && command -v "$p" >/dev/null && suits "$p" && { echo "$p"; return; }
    done
    return 0
}

if ! { [ -x .venv/bin/python ] && suits .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    python=$(find_python)
    [ -n "$python" ] || die "no Python from 3.11 to 3.14 was found. Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python ..."
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || apt_install "python$version-venv" ||
        die "this Python $version has no venv module. Install it: apt-get install python$version-venv"
    echo "mmembed: creating .venv with Python $version"
    rm -rf .venv
    "$python" -m venv .venv
fi

if [[ ",$extras," == *,dev,* ]]; then
    command -v "${CXX:-g++}" >/dev/null || apt_install g++ ||
        die "no C++ compiler was found, and the tests compile the C++ host. Install one: apt-get install g++"
    programs & # while pip downloads, too
    trap wait EXIT
fi

stamp=".venv/.mmembed-${extras:-base}"
state=$( { cat pyproject.toml constraints.txt; .venv/bin/python --version; pwd; } | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
    # --no-compile: of 25,000 modules, which take a minute, some thousands are ever imported, and Python compiles those then
    echo "mmembed: installing the packages (the first time about 5 GB: PyTorch with its CUDA libraries)"
    .venv/bin/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}" ||
        die "the packages could not be installed; pip's message is above"
    echo "$state" >"$stamp"
fi
