"""The drawings of docs/how_it_works.md show what the operators compute, and what the page says of them."""

import json
from itertools import combinations

import pytest
from doc_pages import make_user_folder
from PIL import Image

from scripts.figures import draw_attention, draw_trained
from scripts.figures.worked_example import CHUNK_LENGTH, TEXT, make_example


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The folder that figures go to."""
    for script in (draw_attention, draw_trained):
        monkeypatch.setattr(script, "DOCS", tmp_path)
    monkeypatch.setattr(draw_trained, "RESULTS", tmp_path / "how_it_works.json")
    return tmp_path


def colors(path):
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(maxcolors=2**24))


def test_a_query_meets_the_nearest_earlier_tokens_of_its_bucket():
    example = make_example()
    for number, buckets in enumerate(example.buckets.tolist()):
        assert example.order[number].tolist() == sorted(range(len(TEXT)), key=lambda place: (buckets[place], place))
        for query, met in enumerate(example.keys_met([number]).bool().tolist()):
            earlier = [key for key in range(query) if buckets[key] == buckets[query]][-CHUNK_LENGTH:]
            assert [key for key, is_met in enumerate(met) if is_met] == (earlier or [query])


def test_the_second_round_finds_what_the_page_says():
    example = make_example()
    first, second = example.keys_met([0]), example.keys_met([1])
    pairs = [(query, key) for key, query in combinations(range(len(TEXT)), 2) if TEXT[key] == TEXT[query] == "t"]
    missed = [pair for pair in pairs if not first[pair]]
    assert missed and all(second[pair] for pair in missed)
    # One "t" is on the other side of a border.
    assert len({example.buckets[0, place].item() for place, letter in enumerate(TEXT) if letter == "t"}) == 2


def test_the_successor_is_read():
    example, reader = make_example(), draw_attention.READER
    read = [TEXT[example.attend([0, 1], value_shift=shift)[reader].argmax()] for shift in (0, 1)]
    assert [TEXT[reader], *read] == ["h", "h", "e"]


@pytest.mark.slow
def test_the_worked_example_is_drawn(drawn):
    draw_attention.main()
    names = ["axial_positions.png", "lsh_hashing.png", "lsh_keys.png", "lsh_successor.png"]
    assert sorted(path.name for path in drawn.iterdir()) == names
    assert all(colors(drawn / name) > 8 for name in names)


@pytest.mark.slow
def test_a_trained_model_is_drawn(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    make_user_folder(folder)
    model, text = folder / "runs" / "mine", folder / "my_texts"
    draw_trained.main([f"--model={model}", f"--text_path={text}", "--length=128", "--windows=1"])
    results = json.loads((drawn / "how_it_works.json").read_text())
    assert [sum(sizes) for sizes in results["buckets"]["sizes"]] == pytest.approx([128.0])
    found = [results["recall"][str(number)]["top 1"][0] for number in draw_trained.ROUNDS]
    assert 0 < found[0] < found[-1] <= 1
    draw_trained.main(["--plot-only"])
    assert all(colors(drawn / name) > 8 for name in ("lsh_buckets.png", "lsh_recall.png"))
