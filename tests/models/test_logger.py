"""log.jsonl of an earlier run, which may be damaged, and the extras of training: curves and TensorBoard."""

import os

import pytest

from models import logger
from utils.cli import InputError

LINES = ['{"epoch": 0, "step": 1, "cls": 1.0}', '{"epoch": 0, "cls": 0.5}', '{"epoch": 1, "cls": 0.25}']


open_board = logger._open_board


@pytest.fixture(autouse=True)
def without_board(monkeypatch):
    monkeypatch.setattr(logger, "_open_board", lambda *_: None)


def test_only_lines_as_they_are_written_are_kept(tmp_path):
    odd = ["[" * 100_000, '{"epoch": 0, "step": "x"}', '{"epoch": "0"}', '{"epoch": true}', "{}", "3", "{", "\\udcff"]
    (tmp_path / "log.jsonl").write_bytes("\n".join([*LINES, *odd]).encode() + b"\n\xff\xfe")
    logger.Log(tmp_path, 1, 0, 5)
    assert (tmp_path / "log.jsonl").read_text().splitlines() == LINES[:2]


def test_a_fifo_or_a_link_is_no_log(tmp_path):
    (tmp_path / "precious").write_text("precious")
    for make in (os.mkfifo, lambda path: os.symlink(tmp_path / "precious", path)):
        make(tmp_path / "log.jsonl")
        with pytest.raises(InputError, match="where a file of this program belongs"):
            logger.Log(tmp_path, 1, 0, 5)
        (tmp_path / "log.jsonl").unlink()


def test_curves_are_not_written_through_a_link(tmp_path):
    (tmp_path / "curves").symlink_to(tmp_path)
    with pytest.raises(InputError, match="curves: a link where a folder of this program belongs"):
        open_board(tmp_path, 0)


@pytest.mark.draws
def test_curves_that_cannot_be_drawn_are_a_note_once(tmp_path, monkeypatch, capsys):
    entry = {"epoch": 0, "phase": "warm-up", "lr": 0.1, "kept": []}
    monkeypatch.setattr(logger, "draw_curves", lambda *_: [][0])
    log = logger.Log(tmp_path, 0, 0, 5)
    for _ in range(2):
        logger.show_epoch([entry], 2, log)
    assert capsys.readouterr().err == "note: no curves.png, matplotlib failed: IndexError: list index out of range\n"
