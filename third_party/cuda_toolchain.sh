#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prints a folder to put first in PATH, so that nvcc, nvdisasm and cuobjdump are there. An nvcc 13 that PATH has already is
# used as it is; what is missing is unpacked from pinned wheels into .cache/cuda-toolchain. Does nothing when it is there.
#
#   PATH=$(third_party/cuda_toolchain.sh):$PATH
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The disassemblers are wheels of their own from 13.2 on, and read what the 13.0 compiler makes.
compiler=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.88 nvidia-nvvm==13.0.88)
disassembler=(nvidia-cuda-nvdisasm==13.2.86 nvidia-cuda-cuobjdump==13.2.86)
inside=nvidia/cu13  # where the wheels put bin, include, lib, nvvm

say() { printf 'cuda_toolchain: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

has_release_13() { # TOOL...
  local tool
  for tool in "$@"; do
    "$tool" --version 2> /dev/null | grep -q 'release 13\.' || return 1
  done
}

variant= packages=()
has_release_13 nvcc || { variant=compiler; packages+=("${compiler[@]}"); }
has_release_13 nvdisasm cuobjdump || { variant+=${variant:+-}disassembler; packages+=("${disassembler[@]}"); }
if [ -z "$variant" ]; then
  dirname "$(command -v nvcc)"
  exit
fi

cache=$PWD/.cache/cuda-toolchain
folder=$cache/$variant
bin=$folder/$inside/bin
want=$(printf "%s\n" "${packages[@]}")

new=
trap '[ -z "$new" ] || rm -rf "$new"' EXIT
fetch() { # into a new folder, which takes the old one's place only when it is whole
  local python=python3
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
  new=$(mktemp -d "$cache/new.XXXXXX")
  say "fetching ${packages[*]}"
  "$python" -m pip install --disable-pip-version-check -qq --no-deps --only-binary :all: --target "$new" "${packages[@]}" 1>&2 \
    || die "pip cannot fetch the wheels above (the message before this one says why). Without a network: put an nvcc 13 with nvdisasm and cuobjdump on PATH, or name a folder that holds the wheels in PIP_FIND_LINKS."
  # nvcc.profile looks for the libraries in lib64, the wheel has lib.
  if [ -d "$new/$inside/lib" ]; then ln -sfn lib "$new/$inside/lib64"; fi
  printf '%s\n' "$want" > "$new/.stamp"
  chmod 755 "$new"
  rm -rf "$folder"
  mv "$new" "$folder"
  new=
}

mkdir -p "$cache"
exec 9> "$cache/lock"
flock 9  # two builds at once fetch it once
if [ "$want" != "$(cat "$folder/.stamp" 2> /dev/null)" ]; then
  [ "$(uname -s)" = Linux ] || die "there are wheels for Linux only; put an nvcc 13 on PATH"
  fetch
fi
PATH=$bin:$PATH has_release_13 nvcc nvdisasm cuobjdump || die "the tools in $bin do not run; delete $cache and try again"
echo "$bin"
