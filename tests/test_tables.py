from jaxgen.tables import markdown_table, text_table

ROWS = [{"system": "A", "loss": 0.123456, "calls": 3}, {"system": "baseline", "calls": 16, "note": "3.1 (0.2)"}]


def test_columns_line_up_and_gaps_stay_empty():
    lines = text_table(ROWS).splitlines()
    assert [line.split() for line in lines] == [
        ["system", "loss", "calls", "note"],
        ["A", "0.1235", "3"],
        ["baseline", "16", "3.1", "(0.2)"],
    ]
    assert len({len(line) for line in lines}) == 1
    for word, row in (("system", "A"), ("loss", "0.1235"), ("calls", "3 ")):
        end = lines[0].index(word) + len(word)
        assert lines[1][:end].endswith(row.strip())


def test_markdown():
    assert markdown_table(ROWS).splitlines() == [
        "| system | loss | calls | note |",
        "| --- | --- | --- | --- |",
        "| A | 0.1235 | 3 |  |",
        "| baseline |  | 16 | 3.1 (0.2) |",
    ]


def test_numbers_keep_four_digits():
    table = markdown_table([{"a": 1e-5, "b": 1234567.0, "c": 1234567, "d": 2.0, "e": float("nan"), "f": True}])
    assert table.splitlines()[-1] == "| 1e-05 | 1.235e+06 | 1234567 | 2 | nan | True |"
