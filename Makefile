# Two commands: `make quickstart` runs the main job, `make test` passes every test. Both set up .venv themselves.
.PHONY: quickstart test weekly env dev export sanitize clean

quickstart: env
	@.venv/bin/mmembed quickstart

test: dev
	@.venv/bin/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

# rare and long tests, which `make test` leaves out; recorded in benchmarks/results/weekly.json
weekly: dev
	@.venv/bin/python -m pytest -q --weekly

env:
	@bash tools/setup.sh

dev:
	@bash tools/setup.sh dev

# after changing a notebook: the library, the metadata and the README follow it
export: dev
	@.venv/bin/nbdev-export && .venv/bin/nbdev-clean && for t in pictures sidebar rooms readme; do .venv/bin/python tools/$$t.py || exit 1; done

# the C++ host under the address, leak and undefined-behaviour sanitizers
sanitize: dev
	@.venv/bin/python -m benchmarks.sanitize

clean:
	@rm -rf build dist runs artifacts .pytest_cache .hypothesis *.egg-info
