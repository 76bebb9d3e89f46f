"""The schemas under conf/: defaults are within their limits, and every option has a meaning."""

from dataclasses import fields

from growconv.training import commands, options


def schemas():
    return [*options.SCHEMAS.values(), options.BudgetConfig]


def test_defaults_are_within_their_limits():
    for schema in schemas():
        for entry in fields(schema):
            limits = entry.metadata.get("limits")
            assert limits is None or entry.default == "???" or limits.allow(entry.default), (schema, entry.name)


def test_the_pages_name_every_group_file_and_option_with_a_meaning():
    page = commands.train_page()
    assert max(map(len, f"{commands.first_page()}\n{page}".splitlines())) <= 80
    for group in commands.GROUPS:
        for name in commands.group_names(group):
            assert f"\n  {name}" in page
            assert commands._comment(group, name).endswith("."), (group, name)
    for schema in schemas():
        for name, default, meaning, _ in commands._described(schema):
            assert default, name
            assert meaning, name
