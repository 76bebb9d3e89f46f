"""Run directories made up in the format that training writes."""

import json
import math
import random

import pytest
import yaml

PHASES = {"collect": 0.2, "solve": 0.1, "amplitude": 0.06, "surgery": 0.04}
SITES = ("layer1.0.conv1 -> layer1.0.conv2", "layer2.0.conv1 -> layer2.0.conv2", "stem + layer1.0.conv2 -> head")


def write_run(
    directory, method="tiny", seed=0, epochs=8, accuracy=0.9, parameters=4000, growth=True, data="digits", **settings
):
    """A finished run: `accuracy` is its test accuracy, `settings` are dotted config entries."""
    draw = random.Random(f"{method} {seed}")
    directory.mkdir(parents=True, exist_ok=True)
    config = {"seed": seed, "data": {"name": data, "root": str(directory)}, "growth": {"method": method}}
    for key, value in settings.items():
        section, _, name = key.partition("__")
        config.setdefault(section, {})[name] = value
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    lines = []
    for epoch in range(1, epochs + 1):
        reached = accuracy * (1 - math.exp(-0.8 * epoch)) + draw.uniform(-0.002, 0.002)
        line = {"step": 50 * epoch, "epoch": epoch, "train_loss": 2.3 * math.exp(-0.5 * epoch), "val_accuracy": reached}
        line |= {"val_loss": 2.4 * math.exp(-0.4 * epoch) + 0.1, "train_accuracy": min(1.0, reached + 0.02)}
        line |= {"parameters": parameters, "train_flops": 1e9 * epoch, "seconds": 2.5 * epoch, "learning_rate": 0.1}
        lines.append(json.dumps(line))
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    events = []
    for step in (75, 180, 290) if growth else ():
        for site in SITES:
            gains = sorted((draw.lognormvariate(-3, 1.5) for _ in range(9)), reverse=True)
            width = 4 + 3 * (step // 75)
            predicted = draw.uniform(0.01, 0.2)
            events.append(
                {"step": step, "site": site, "method": method, "channels": 3, "width_before": width}
                | {"width_after": width + 3, "amplitude": 0.5, "gains": gains[:3], "seconds": 0.4, "reason": None}
                | {"predicted_decrease": predicted, "realised_decrease": predicted * draw.uniform(0.4, 1.1)}
                | {"parameters_before": 1000, "parameters_after": 1250}
                | {"edits": [{"module": site.split(" ")[0], "tensor": "weight", "axis": 0, "position": 4, "count": 3}]}
                | {"details": {"captured_energy": draw.uniform(0.05, 0.4), "spectrum": gains, "seconds": PHASES}}
            )
            events[-1]["details"]["losses"] = [[0.0, 0.75], [0.5, 0.625]]
    (directory / "growth.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    layers = {path: [4, 3, 3, 3] for site in SITES for path in site.replace(" + ", " -> ").split(" -> ")}
    told = {"command": ["growconv"], "started": "2026-01-31T12:00:00+00:00", "layers": layers}
    (directory / "environment.json").write_text(json.dumps(told))
    summary = {
        "test_accuracy": accuracy,
        "test_loss": 1.0 - accuracy,
        "best_val_accuracy": accuracy + 0.01,
        "parameters": parameters,
        "seed": seed,
    }
    summary |= {"train_flops": 1e9 * epochs, "seconds": 2.5 * epochs, "growth_events": len(events), "method": method}
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


@pytest.fixture
def make_run(tmp_path):
    """A function that writes a run below the test's own folder."""
    return lambda name, **options: write_run(tmp_path / name, **options)
