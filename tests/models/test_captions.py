"Captions: formats, damage, and prompts that never meet the evaluation."
import csv
import json

import pytest

from s4s_nb.models import conditions as m


@pytest.mark.parametrize("name,data,message", [
    ("a.csv", b"id,caption\n1,x\n", "not captions .*expected a table with a column 'text'"),
    ("a.csv", b"id,text\n1\n", "not captions"),
    ("a.json", b'{"images": []}', "not captions .*expected COCO's annotations"),
    ("a.json", b"[1, 2", "not captions"),
    ("a.json", b'{"annotations": [{"caption": 3}]}', "not captions"),
    ("a.txt", b"\xff\xfe\x00", "not captions"),
    ("a.txt", b"", "0 captions, expected 1"),
    ("a.txt", b"one\n\nthree\n", "caption 2 is empty"),
    ("a.pkl", b"", "expected one of: .csv")])
def test_files_that_are_no_captions_are_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message): m.captions(tmp_path / name, 3 if b"three" in data else 1)


def test_captions_keep_commas_quotes_and_line_breaks(tmp_path):
    texts = ['A "big" dog, running.', "Zwei Züge,\nein Gleis", "猫\u2028猫"]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as f:
        csv.writer(f).writerows([["text", "id"], *((t, i) for i, t in enumerate(texts))])
    annotations = [dict(image_id=i, caption=t) for i, t in enumerate(texts)]
    (tmp_path / "a.json").write_text(json.dumps(dict(annotations=annotations)))
    assert m.captions(tmp_path / "a.csv", None) == m.captions(tmp_path / "a.json", 3) == texts
    (tmp_path / "a.txt").write_text("\r\n".join(texts[::2]), encoding="utf-8", newline="")
    assert m.captions(tmp_path / "a.txt", None) == texts[::2]   # lines end where Python's files end them, as in LD3


def test_training_prompts_never_meet_the_evaluation():
    evaluation = ["A cat.", "Two  dogs!"]
    candidates = ["a CAT", "two dogs", "a bird", "A bird?", "a fish", "a mouse"]
    assert m.training_prompts(candidates, evaluation, 2) == ["a bird", "a fish"]
    with pytest.raises(ValueError, match="1 prompts remain"): m.training_prompts(["a bird", "a cat"], evaluation, 2)
