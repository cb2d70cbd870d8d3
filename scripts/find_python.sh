#!/bin/sh
# Prints the path of a CPython that can run this project: 3.12 to 3.14, final release, able to make a venv.
# PYTHON=... names one and is never passed over. Every candidate is run, since a file that exists may not work
# (a pyenv shim for a version that is not selected, say). Uses the shell alone: nothing else need be installed.
# FIND_PYTHON_ROOT stands in front of the absolute paths; the tests set it.

root="${FIND_PYTHON_ROOT:-}"
home="${HOME:-/nonexistent}"
data="${XDG_DATA_HOME:-$home/.local/share}"
tried=""
without_venv=""

# The candidate's answer is one line: "ok PATH", "venv VERSION" or a reason.
question='
import platform, sys
version = platform.python_version()
if not (3, 12) <= sys.version_info[:2] < (3, 15):
    print("is", version)
elif sys.version_info.releaselevel != "final":
    print("is the pre-release", version)
elif sys.implementation.name != "cpython":
    print("is", sys.implementation.name)
elif sys.maxsize < 2**32:
    print("is a 32-bit build")
elif "free-threading" in sys.version:
    print("is a free-threaded build, which not every dependency supports")
else:
    try:
        import ensurepip, venv
        print("ok", sys.executable)
    except ImportError:
        print("venv", "%d.%d" % sys.version_info[:2])
'

try() {
    if ! answer=$("$1" -c "$question" 2>/dev/null </dev/null) || [ -z "$answer" ]; then
        answer="does not run"
    fi
    case "$answer" in
        "ok "*)
            printf '%s\n' "${answer#ok }"
            exit 0
            ;;
        "venv "*)
            [ -n "$without_venv" ] || without_venv="${answer#venv }"
            answer="is ${answer#venv } without the venv module"
            ;;
    esac
    tried="$tried
  $1 $answer"
}

try_if_there() {
    if [ -x "$1" ] && [ ! -d "$1" ]; then
        try "$1"
    fi
}

finish() {
    {
        printf '%s\n' "$1$tried"
        if [ -n "$without_venv" ]; then
            echo "Python $without_venv is here, but cannot make a virtual environment. On Debian and Ubuntu:"
            echo "  apt-get install python$without_venv-venv"
        else
            echo "Install one of them, for example:"
            echo "  Debian, Ubuntu:  apt-get install python3.12 python3.12-venv"
            echo "  Fedora:          dnf install python3.12"
            echo "  macOS:           brew install python@3.12"
            echo "  anywhere:        uv python install 3.12, pyenv install 3.12 or conda create -n py312 python=3.12"
        fi
        echo "Then run make again, or name an interpreter: make quickstart PYTHON=/path/to/python3.12"
    } >&2
    exit 1
}

if [ -n "${PYTHON:-}" ]; then
    try "$PYTHON"
    finish "PYTHON=$PYTHON does not serve; wanted CPython 3.12, 3.13 or 3.14 with venv:"
fi

# 3.12 first: constraints.txt was tested with it.
for name in python3.12 python3.13 python3.14 python3 python; do
    if command -v "$name" >/dev/null 2>&1; then
        try "$name"
    fi
done

for version in 3.12 3.13 3.14; do
    for candidate in \
        "${PYENV_ROOT:-$home/.pyenv}/versions/$version"*/bin/python \
        "${UV_PYTHON_INSTALL_DIR:-$data/uv/python}/cpython-$version"*/bin/python3 \
        "${ASDF_DATA_DIR:-$home/.asdf}/installs/python/$version"*/bin/python \
        "${MISE_DATA_DIR:-$data/mise}/installs/python/$version"*/bin/python \
        "$root/opt/homebrew/opt/python@$version/bin/python$version" \
        "$root/usr/local/opt/python@$version/bin/python$version" \
        "$root/home/linuxbrew/.linuxbrew/opt/python@$version/bin/python$version" \
        "$root/Library/Frameworks/Python.framework/Versions/$version/bin/python3" \
        "$root/usr/local/bin/python$version" \
        "$root/usr/bin/python$version" \
        "$root/opt/python$version"*/bin/python3 \
        "$root/opt/python/$version"*/bin/python3; do
        try_if_there "$candidate"
    done
done

for conda in "${CONDA_PREFIX:-}" "${CONDA_EXE:+${CONDA_EXE%/bin/*}}" \
    "$home/miniforge3" "$home/mambaforge" "$home/miniconda3" "$home/anaconda3" \
    "$root/opt/conda" "$root/opt/miniforge3" "$root/opt/miniconda3" "$root/opt/anaconda3"; do
    if [ -n "$conda" ]; then
        for candidate in "$conda/bin/python" "$conda"/envs/*/bin/python; do
            try_if_there "$candidate"
        done
    fi
done

finish "No suitable Python found; wanted CPython 3.12, 3.13 or 3.14 with venv. Tried:"
