# make demo   train and test SBKA end to end on the built-in miniature benchmark
# make page   draw in the browser, and see the demo's photos: http://127.0.0.1:8000
# make test   run the tests, on all cores
# make lint   check style
# make torture   kill a training process a dozen times and compare where it ends
# make fuzz   read 100,000 damaged features and masks
# make gpu    check and measure what runs on a GPU, in ten minutes; writes gpu_report.md
# Each sets up .venv first; `make PYTHON=python3.12 test` chooses the Python that it is made from.

PYTHON ?= python3
SEED ?= 0
DEMO ?= demo
TRAIN ?=
PORT ?= 8000
PY := .venv/bin/python
MINIATURE := --data_root $(DEMO)/data --model convnextv2_atto --input_size 48

.PHONY: demo page test torture fuzz gpu lint lock

demo: .venv/ready
	test -e $(DEMO)/data/zeroshot1/cid_mask.pickle || $(PY) -m datasets.prepare miniature $(DEMO)/data
	$(PY) train_sketchy_ext.py $(MINIATURE) --finetune none --epochs 12 --warmup_epochs 6 --batch_size 30 \
		--lr 1.5e-3 --weight_decay 0 --seed $(SEED) --savedir $(DEMO)/checkpoint --overwrite $(TRAIN)
	$(PY) test_sketchy_ext_zeroshot.py $(MINIATURE) --clusters 6 7 8 9 10 --resume_dir $(DEMO)/checkpoint

# The page needs no PyTorch on what was exported, so it starts at once, in a fraction of the memory.
page: .venv/ready
	test -e $(DEMO)/checkpoint/model_best.pth.tar || $(MAKE) demo
	test $(DEMO)/student.onnx -nt $(DEMO)/checkpoint/model_best.pth.tar || \
		$(PY) -m models.export $(DEMO)/checkpoint/model_best.pth.tar --to $(DEMO)/student.onnx
	test $(DEMO)/photo_index/index.json -nt $(DEMO)/student.onnx || rm -rf $(DEMO)/photo_index
	$(PY) search_photos.py index $(DEMO)/data/256x256/photo/tx_000000000000_ready --index $(DEMO)/photo_index \
		--checkpoint $(DEMO)/student.onnx
	$(PY) search_photos.py page --index $(DEMO)/photo_index --port $(PORT)

test: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist worksteal

torture: .venv/ready
	$(PY) tests/helpers/kill_resume.py

fuzz: .venv/ready
	$(PY) tests/helpers/fuzz.py

gpu: .venv/ready
	$(PY) benchmarks/gpu.py

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Renews requirements.lock from the lower bounds; needs uv.
lock:
	uv pip compile --quiet --universal --python-version 3.10 requirements.txt requirements-page.txt requirements-dev.txt \
		-o requirements.lock --upgrade

.venv/ready: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 2; }
	@echo "setting up .venv, about 6 GB once unpacked"
	@$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) cannot make a .venv; on Debian: apt install python3-venv"; exit 2; }
	@$(PY) -m pip install --disable-pip-version-check -r requirements.lock
	@touch $@
