#!/bin/sh
# Says what is missing before anything is installed: Python >= 3.10 with venv and headers, a C++ compiler.
set -u
python=${PYTHON:-python3}
missing=0
need() {
    printf 'missing: %s\n  Debian, Ubuntu: apt-get install %s\n  Fedora: dnf install %s\n  macOS: %s\n' "$1" "$2" "$3" "$4" >&2
    missing=1
}
if ! command -v "$python" >/dev/null 2>&1; then
    need "Python 3.10 or newer ('$python' is not found; set PYTHON=...)" python3 python3 "brew install python"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    need "Python 3.10 or newer ('$python' is $("$python" -V 2>&1); set PYTHON=...)" python3 python3 "brew install python"
else
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        need "the venv module of $python" python3-venv python3 "brew install python"
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        need "the headers of $python (Python.h)" python3-dev python3-devel "brew install python"
fi
command -v "${CXX:-c++}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 ||
    need "a C++ compiler (needed by onedl-mmcv and by the CPU kernels)" g++ gcc-c++ "xcode-select --install"
exit $missing
