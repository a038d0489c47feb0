"""What a sweep's YAML file means, and how a wrong one is told."""

from pathlib import Path

import pytest
from sweep.conftest import BASE

from dense_shortcuts import DenseShortcutError, recipes
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.sweep.spec import read_sweep, slug

ROOT = Path(__file__).parents[2]


def read(text: str, *changes: str, data_dir: str | None = None):
    Path("s.yaml").write_text(text)
    return read_sweep(Path("s.yaml"), changes, data_dir)


def test_cells_are_all_rows_with_one_seed_after_the_other():
    keys = [cell.key for cell in read_sweep(Path("s.yaml")).cells()]
    assert keys == ["host/seed-0", "dsnet/seed-0", "host/seed-1", "dsnet/seed-1"]


def test_a_grid_is_the_product_of_its_lists_and_an_entry_can_have_its_own():
    rows = read(f"{BASE}grid: {{norm: [group, batch], lr: [0.1, 1e-1]}}\nseeds: [3]\n").rows
    assert [(row.config.norm, row.config.lr) for row in rows[:3]] == [("group", 0.1), ("group", 0.1), ("batch", 0.1)]
    entry = "grid: [{name: host, settings: {lr: 0.3}}, {name: DS, settings: {lr: 0.2}, grid: {norm: [layer, batch]}}]"
    rows = read(f"{BASE}{entry}\nseeds: [3]\n").rows
    assert [row.name for row in rows] == ["host", "DS norm=layer", "DS norm=batch"]
    assert [(row.config.norm, row.config.lr) for row in rows[1:]] == [("layer", 0.2), ("batch", 0.2)]
    assert rows[0].config.lr == 0.3 and {row.config.epochs for row in rows} == {2}


def test_base_may_be_a_recipe_beside_the_file():
    Path("r.yaml").write_text("epochs: 7\nseed: 5\n")
    assert read("base: r.yaml\ngrid: {norm: [group]}\nseeds: [0]\n").rows[0].config.epochs == 7


def test_settings_of_the_command_line_have_the_last_word_in_every_row():
    sweep = read(f"{BASE}grid: [{{name: a, settings: {{lr: 0.3}}}}]\nseeds: [0]\n", "lr=0.5", "milestones=[1, 2]")
    assert (sweep.rows[0].config.lr, sweep.rows[0].config.milestones) == (0.5, (1, 2))
    assert read(f"{BASE}grid: {{norm: [group]}}\nseeds: [0]\n", data_dir="here").rows[0].config.data_dir == "here"


def test_slugs_are_plain_folder_names():
    assert slug("DSNet-50, group norm (20 epochs)/x") == "dsnet-50-group-norm-20-epochs-x"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("base: {\n", "is not valid YAML"),
        ("[1, 2]\n", "must hold lines of the form"),
        ("grid: {norm: [group]}\nseeds: [0]\n", "needs `base:`"),
        (f"{BASE}seeds: [0]\n", "needs `grid:`"),
        (f"{BASE}grid: [1]\nseeds: [0]\n", "needs `grid:`"),
        (f"{BASE}grid: {{norm: group}}\nseeds: [0]\n", "must hold lines of the form `norm: [group, batch]`"),
        (f"{BASE}grid: [{{name: a, settings: 3}}]\nseeds: [0]\n", "`settings:` of row 'a'"),
        (f"{BASE}grid: {{nrom: [group]}}\nseeds: [0]\n", "has the unknown key 'nrom': did you mean 'norm'"),
        (f"{BASE}grid: {{norm: [grup]}}\nseeds: [0]\n", "norm in row 'norm=grup' of s.yaml is 'grup'"),
        (f"{BASE}grid: {{norm: [group]}}\nseed: [0]\n", "unknown key 'seed': did you mean 'seeds'"),
        (f"{BASE}grid: {{norm: [group]}}\nseeds: 3\n", "needs `seeds:`"),
        (f"{BASE}grid: {{norm: [group]}}\nseeds: [0, 0]\n", "needs `seeds:`"),
        (f"{BASE}grid: {{norm: [group]}}\nseeds: [true]\n", "needs `seeds:`"),
        (f"{BASE}grid: {{seed: [0, 1]}}\nseeds: [0]\n", "sets seed, which a sweep takes from `seeds:`"),
        (f"{BASE}grid: [{{settings: {{lr: 1}}}}]\nseeds: [0]\n", "one without a name"),
        (f"{BASE}grid: [{{name: a b}}, {{name: a-b}}]\nseeds: [0]\n", "two rows named"),
        (f"{BASE}grid: [{{name: a, setings: {{}}}}]\nseeds: [0]\n", "did you mean 'settings'"),
        (f"{BASE}grid: [{{name: a, against: b}}]\nseeds: [0]\n", "`against: b` in row 'a'"),
        (f"{BASE}grid: [{{name: a, same_budget_as: a}}]\nseeds: [0]\n", "no other row's name"),
        (
            f"{BASE}grid: [{{name: a}}, {{name: b, same_budget_as: a}}, {{name: c, same_budget_as: b}}]\nseeds: [0]\n",
            "has none of its own",
        ),
        (f"{BASE}grid: {{precision: ['no', bf16]}}\nseeds: [0]\n", "another precision"),
    ],
    ids=lambda value: value.removeprefix(BASE).strip() if "\n" in value else "",
)
def test_a_wrong_file_is_told_in_one_sentence_and_leaves_nothing(text, sentence, capsys):
    Path("s.yaml").write_text(text)
    assert main(["sweep", "s.yaml"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and error.endswith(".\n")
    assert not Path("runs").exists()


@pytest.mark.parametrize("change", ["lr", "=3", "lr=[", "lr=fast", "lrr=3"])
def test_a_wrong_setting_on_the_command_line_is_told(change):
    with pytest.raises(DenseShortcutError, match=r"\.$"):
        read_sweep(Path("s.yaml"), [change])


SWEEPS = [path for path in sorted(recipes.FOLDER.glob("*.yaml")) if "\ngrid:" in path.read_text()]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_among_the_recipes_reads_and_has_a_bigger_host_or_says_why_not(path):
    sweep = read_sweep(path)
    assert len(sweep.seeds) >= 3 or path.stem.endswith("screen")
    assert any(row.same_budget_as for row in sweep.rows) != ("no wider host" in path.read_text().lower())
