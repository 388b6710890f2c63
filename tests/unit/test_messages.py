"""The words of errors and printed lines."""

from tests.messages import list_messages, list_sources

# Ways to say it that have to be read twice; the field's word or a plain clause says the same.
HARD_TO_READ = ("of what", "whoever", "so that", "cannot work", "makes no sense", "in vain", "is none;")


def test_messages_are_plain():
    messages = [(path.name, line, text) for path in list_sources([]) for line, text in list_messages(path)]
    assert len(messages) > 350
    assert [one for one in messages if any(phrase in one[2].lower() for phrase in HARD_TO_READ)] == []


def test_messages_are_found_with_their_fields(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        'def check(count):\n    if count < 1:\n        raise ValueError(f"--threads must be at least 1, got {count}")\n'
        '    print("one " + f"of {count}")\n    yield f"a {count}"\n    raise KeyError("name")\n'
    )
    assert sorted(list_messages(source)) == [
        (3, "--threads must be at least 1, got {count}"),
        (4, "one of {count}"),
        (5, "a {count}"),
    ]
