#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes .venv with torch, the development tools and lissom itself (editable). Does nothing when all that is up to date.
#
#   third_party/bootstrap.sh              what `make demo` and `make test` call
#   third_party/bootstrap.sh --openvino   also the optional peer of `lissom bench`
#
# TORCH_SPEC   what pip installs as torch (default: the CPU build of torch 2.13.0)
# LISSOM_CUDA  1: with CUDA kernels, 0: without (default: where nvcc is in PATH and torch is a CUDA build)
# LISSOM_APT=1 as root: install missing Debian packages (compiler, venv, chromium) instead of naming them
# PYTHON, CXX  which interpreter and compiler (default: python3, g++)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
cxx=${CXX:-g++}
venv=.venv
torch_version=2.13.0
torch_cpu_index=https://download.pytorch.org/whl/cpu

say() { printf 'bootstrap: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
may_apt() { [ "$(id -u)" = 0 ] && [ "${LISSOM_APT:-0}" = 1 ] && command -v apt-get > /dev/null; }

apt_updated=no
apt_install() { # PACKAGE...
  say "apt-get install $*"
  if [ $apt_updated = no ]; then apt-get -qq update || say "apt-get update failed; trying with the lists there are"; fi
  apt_updated=yes
  DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "$@" > /dev/null
}

missing_tools() { # one line each: what a build needs and is not there
  command -v "$python" > /dev/null || { echo "Python (>= 3.10)"; return; }
  "$python" -c 'import ensurepip, venv' 2> /dev/null || echo "Python's venv module"
  "$python" -c 'import os, sysconfig; raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
    || echo "Python.h"
  command -v "$cxx" > /dev/null || echo "$cxx"
}

check_tools() {
  local missing
  missing=$(missing_tools)
  if [ -n "$missing" ] && may_apt; then
    apt_install python3-venv python3-dev g++ make || die "apt-get could not install the tools above"
    missing=$(missing_tools)
  fi
  [ -z "$missing" ] || die "missing: ${missing//$'\n'/, }. On Debian or Ubuntu: sudo apt-get install python3-venv python3-dev g++ make"
  "$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' \
    || die "$python is $("$python" -V 2>&1), 3.10 or newer is needed; name another one: PYTHON=python3.11 make ..."
  local major
  major=$("$cxx" -dumpversion) && major=${major%%.*}
  if "$cxx" --version | grep -qi clang; then [ "$major" -ge 14 ] || die "$cxx is clang $major, 14 or newer is needed"
  else [ "$major" -ge 11 ] || die "$cxx is GCC $major, 11 or newer is needed; name another one: CXX=g++-12 make ..."; fi
}

install_chromium() { # only for the report's browser test, which is skipped without it
  if may_apt && ! command -v chromium > /dev/null; then
    apt_install chromium || say "chromium could not be installed: the report's browser test will be skipped"
  fi
}

pip_install() { "$venv/bin/python" -m pip install --disable-pip-version-check -qq "$@"; }

install_torch() { # keeps a torch that the venv already has
  if "$venv/bin/python" -c 'import torch' 2> /dev/null; then return; fi
  if [ -n "${TORCH_SPEC:-}" ]; then
    say "installing $TORCH_SPEC"
    pip_install "$TORCH_SPEC" || die "pip cannot install TORCH_SPEC='$TORCH_SPEC'"
    return
  fi
  say "installing torch $torch_version for the CPU"
  local log=$venv/torch-install.log
  pip_install "torch==$torch_version+cpu" 2> "$log" && return
  pip_install --extra-index-url "$torch_cpu_index" --timeout 15 --retries 1 "torch==$torch_version+cpu" 2>> "$log" && return
  say "no CPU build of torch $torch_version in reach; taking the default one (several GB with CUDA; set TORCH_SPEC to choose)"
  pip_install "torch==$torch_version" && return
  cat "$log" >&2
  die "pip cannot install torch $torch_version; set TORCH_SPEC or pip's index settings and run again"
}

stamp() { # changes with everything that the installed package depends on, and with the folder (venvs cannot move)
  { pwd; "$python" -V; echo "${TORCH_SPEC:-} ${LISSOM_CUDA:-}"; cat pyproject.toml setup.py CMakeLists.txt third_party/bootstrap.sh
    find csrc -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum; } | sha256sum | cut -d' ' -f1
}

install_lissom() {
  local want=$1
  say "building and installing lissom (a few minutes the first time)"
  # Not isolated: CMake's cache stays valid, so that the next build compiles only what changed.
  pip_install --upgrade 'pip>=23' 'setuptools>=77' 'cmake>=3.26' ninja 'pybind11>=2.13'
  PATH=$PWD/$venv/bin:$PATH pip_install --no-build-isolation -e '.[dev,plots]' || die "lissom does not build; the compiler's message is above"
  "$venv/bin/python" -c 'import lissom; lissom.build_info()' || die "lissom was installed but does not import"
  echo "$want" > "$venv/.lissom-ready"
}

check_tools
[ -x "$venv/bin/python" ] || { say "creating $venv"; "$python" -m venv "$venv"; }
install_chromium
want=$(stamp)
if [ "$want" != "$(cat "$venv/.lissom-ready" 2> /dev/null)" ]; then
  install_torch
  install_lissom "$want"
fi
for option in "$@"; do
  case $option in
    --openvino) "$venv/bin/python" -c 'import openvino' 2> /dev/null || pip_install openvino ;;
    *) die "unknown option $option (there is only --openvino)" ;;
  esac
done
