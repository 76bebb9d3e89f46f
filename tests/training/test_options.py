"""The schemas under conf/: defaults are within their limits, and every option has a meaning."""

from dataclasses import fields

from growconv.training import options, usage


def schemas():
    return [*options.SCHEMAS.values(), options.BudgetConfig]


def test_defaults_are_within_their_limits():
    for schema in schemas():
        for entry in fields(schema):
            limits = entry.metadata.get("limits")
            assert limits is None or entry.default == "???" or limits.allow(entry.default), (schema, entry.name)


def test_the_pages_name_every_group_file_and_option_with_a_meaning():
    page = usage.train_page()
    assert max(map(len, f"{usage.first_page()}\n{page}".splitlines())) <= 80
    for group in usage.GROUPS:
        for name in usage.group_names(group):
            assert f"\n  {name}" in page
            assert usage._comment(group, name).endswith("."), (group, name)
    for schema in schemas():
        for name, default, meaning, _ in usage._described(schema):
            assert default, name
            assert meaning, name
