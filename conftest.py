"""`pytest --benchmark` times the benchmarks and runs nothing else; plain `pytest` runs them once each, verified and
untimed.

pytest-benchmark has no option of that name, and may not be installed: then the benchmarks are verified, and the
summary says that nothing was timed. Its own options (--benchmark-only, --benchmark-json ...) keep their meaning.
"""

from __future__ import annotations

import pytest

MAX_SAMPLES = 200  # per benchmark in --benchmark-json, which would otherwise hold every single one
EXPLICIT = ("only", "skip", "enable", "disable", "json", "save", "autosave", "save_data", "compare", "storage_save")
NOT_INSTALLED = "pytest-benchmark is not installed (pip install pytest-benchmark): benchmarks were verified, not timed"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("benchmark").addoption(
        "--benchmark", action="store_true", dest="run_benchmarks", help="Time the benchmarks, and run nothing else."
    )


def pytest_configure(config: pytest.Config) -> None:
    """Translate --benchmark for pytest-benchmark, which reads its options later; stand in for it when it is missing."""
    if not config.pluginmanager.hasplugin("benchmark"):
        config.addinivalue_line("markers", "benchmark: settings of a benchmark (pytest-benchmark)")
        config.pluginmanager.register(NotInstalled(config), "benchmark-not-installed")
        return
    if config.option.run_benchmarks:
        config.option.benchmark_only = True
    elif not any(getattr(config.option, f"benchmark_{name}", None) for name in EXPLICIT):
        config.option.benchmark_disable = True


class NotInstalled:
    """What is left without pytest-benchmark: a `benchmark` fixture that calls once, and the selection."""

    def __init__(self, config: pytest.Config):
        self.only = config.option.run_benchmarks

    @pytest.fixture
    def benchmark(self) -> CallOnce:
        return CallOnce()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if self.only and "benchmark" not in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="not a benchmark (--benchmark)"))

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.only:
            terminalreporter.section("benchmarks")
            terminalreporter.write_line(NOT_INSTALLED)


class CallOnce:
    """The part of pytest-benchmark's fixture that our benchmarks use."""

    stats = None

    def __init__(self):
        self.extra_info: dict = {}
        self.group: str | None = None

    def __call__(self, fn, *args, **kwargs):
        return fn(*args, **kwargs)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json: dict) -> None:
    """Keep MAX_SAMPLES samples per benchmark, evenly spaced; the statistics were taken from all of them."""
    for entry in output_json["benchmarks"]:
        samples = entry["stats"].get("data", [])
        if len(samples) > MAX_SAMPLES:
            entry["stats"]["data"] = [samples[i * len(samples) // MAX_SAMPLES] for i in range(MAX_SAMPLES)]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Print what pytest-benchmark's table cannot: rates, share of the ceiling, error. Only of benchmarks that tell."""
    benchmarks = getattr(getattr(config, "_benchmarksession", None), "benchmarks", [])
    rows = [(b.name, b.stats.median * 1e6, b.extra_info) for b in benchmarks if "gflops" in b.extra_info and b.stats]
    if not rows:
        return
    terminalreporter.section(
        "rates and errors (median wall time; % of the register-only FMA loop; worst e_ours / e_torch)"
    )
    terminalreporter.write_line(f"{'median us':>12} {'GFLOP/s':>9} {'GB/s':>7} {'% peak':>7} {'error':>9}  case")
    for name, median, info in rows:
        share = "-" if info.get("peak_pct") is None else f"{info['peak_pct']:.1f}"
        rates = f"{median:12.1f} {info['gflops']:9.2f} {info['gbps']:7.2f} {share:>7} {info['error_ratio']:9.2f}"
        terminalreporter.write_line(f"{rates}  {name[name.find('[') + 1 : -1]}")
