# SPDX-License-Identifier: Apache-2.0
# Each target sets up what it needs by itself; everything else is an argument of `lissom` (lissom --help).
.PHONY: setup models demo test test-all bench report docs lint format asan cuda-check clean
.DEFAULT_GOAL := demo

PYTEST := .venv/bin/python -m pytest

setup:               ; @third_party/bootstrap.sh
models: setup        ; @.venv/bin/python third_party/models.py --optional && .venv/bin/python third_party/corpora.py --optional
demo: setup          ; @.venv/bin/lissom demo --overwrite
test: setup          ; $(PYTEST) -m "not slow and not cuda"
test-all: models     ; $(PYTEST)
bench: setup         ; .venv/bin/lissom bench sparse24
report: setup        ; .venv/bin/lissom report
docs: setup          ; $(PYTEST) tests/house/test_docs.py tests/house/test_howto.py
lint: setup          ; @.ci/lint
format: setup        ; @.ci/lint --fix
asan: setup          ; @.ci/asan
cuda-check: setup    ; @.ci/cuda-check
clean:               ; rm -rf build dist python/*.egg-info python/lissom/_C*.so .venv/.lissom-ready
