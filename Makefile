.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo setup test check faults bench lock release

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: ## one real microscope image through one real worker; says where the results are
	@scripts/setup
	@.venv/bin/python -u -m demo.run

setup: ## the virtual environment, a container engine, and what the tests need
	@scripts/setup --tests

check: ## lint, format, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: setup check ## set-up, checks, and all tests on the real engine
	scripts/test

faults: setup ## the tests of faults and threats, and a table of which row each of them carries
	.venv/bin/python -m pytest --faults-table

bench: setup ## how fast it is, against its peers; half an hour, rows in build/bench.json
	.venv/bin/python -m benchmarks

lock: ## the lock files below requirements/, after a change of pyproject.toml
	scripts/lock

release: ## the image of a release, from a committed base by digest
	scripts/image-release
