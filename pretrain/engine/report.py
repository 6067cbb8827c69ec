"""The planner's report: cost, memory and hours of a configuration as one dictionary (JSON) and as a readable table."""

from dataclasses import asdict, replace

from pretrain.config import PretrainConfig
from pretrain.engine.cost import Plan, Towers, describe_towers, main_phases, make_plan
from pretrain.engine.device import Device
from pretrain.engine.measure import measure_phase
from pretrain.engine.memory import largest_micro_batch, optimizer_bytes, phase_memory, uses_bf16


def make_report(
    config: PretrainConfig, devices: int = 1, memory_limit: float | None = None, throughput: float | None = None,
    flops: float | None = None, measure: bool = False, measure_batch: int = 0, measure_seconds: float = 5.0,
    baseline: PretrainConfig | None = None, baseline_image_size: int | None = None,
    baseline_context_length: int | None = None,
) -> dict:  # fmt: skip
    """Plan a configuration.

    Args:
        config: checked configuration.
        devices: how many share each batch.
        memory_limit: bytes; adds the largest micro batch that fits to every phase.
        throughput: pairs a second of one device in the first phase; other phases are scaled by their FLOPs.
        flops: FLOP/s that one device sustains.
        measure: time real steps of every phase and of the baseline on the configured device.
        measure_batch: pairs of a measured step; 0: what fits.
        measure_seconds: for each phase.
        baseline, baseline_image_size, baseline_context_length: see `make_plan`.

    Returns:
        JSON-ready: `phases`, `training_flops`, `baseline`, `baseline_training_flops`, `saving`, and with a speed
        `device_hours`, `baseline_device_hours` and `time_saving`. What is of the baseline is None where there is none
        (see `make_plan`). FLOPs of a sample are forward, of a phase training; memory is in bytes and an estimate; hours
        are those of one device, so N devices take an N-th in time.

    Raises:
        ConfigError: for sizes that the towers cannot take or a batch that cannot be shared.
    """
    towers = describe_towers(config.model)
    plan = make_plan(config, devices, baseline, baseline_image_size, baseline_context_length, towers)
    phases = _phases(config, plan, towers, devices, memory_limit)
    report = {
        "parameters": sum(p.numel() for p in towers.module.parameters()),
        "devices": devices,
        "precision": "bf16" if uses_bf16(config) else "fp32",
        "phases": phases,
        "samples": sum(cost.samples for cost in plan.phases),
        "training_flops": plan.training_flops,
        "teacher_flops": sum(cost.teacher_flops for cost in plan.phases),
        "recompute_flops": sum(cost.recompute_flops for cost in plan.phases),
        "loss_flops": sum(cost.loss_flops for cost in plan.phases),
        "baseline": asdict(plan.baseline) if plan.baseline else None,
        "baseline_training_flops": plan.baseline.training_flops if plan.baseline else None,
        "saving": plan.saving,
    }
    if measure:
        speeds = _measure(config, plan, towers, baseline, measure_batch, measure_seconds)
        for entry, speed in zip(phases, speeds, strict=False):
            entry["measured"] = asdict(speed)
        if plan.baseline:
            report["baseline"]["measured"] = asdict(speeds[-1])
        _add_hours(report, plan, [speed.flops_per_second for speed in speeds])
    elif throughput or flops:
        rate = flops or throughput * plan.phases[0].device_flops / plan.phases[0].samples
        _add_hours(report, plan, [rate] * (len(phases) + 1))
    return report


def _phases(config: PretrainConfig, plan: Plan, towers: Towers, devices: int, memory_limit: float | None) -> list[dict]:
    """Cost and memory of every phase, with its own optimiser."""
    states: dict[str, int] = {}
    entries = []
    for phase, cost in zip(config.phases, plan.phases, strict=True):
        optim = config.optim_of(phase)
        if (key := repr(optim)) not in states:
            states[key] = optimizer_bytes(towers.module, optim)
        memory = phase_memory(phase, towers, config, devices, states[key])
        entry = {**asdict(cost), "memory_bytes": memory.total, "memory": asdict(memory)}
        if memory_limit:
            fitting = largest_micro_batch(phase, towers, config, memory_limit, devices, states[key])
            entry["micro_batch_that_fits"] = fitting
        entries.append(entry)
    return entries


def _measure(
    config: PretrainConfig, plan: Plan, towers: Towers, baseline: PretrainConfig | None, batch: int, seconds: float
) -> list:
    """Speed of every phase, and of the baseline if there is one."""
    device = Device(config.run.device, config.run.precision)
    speeds = [measure_phase(config, phase, towers, device, batch, seconds) for phase in config.phases]
    if plan.baseline is None:
        return speeds
    full = replace(
        main_phases(config.phases, plan.baseline.image_size)[0], micro_batch_size=0, token_dropping="none",
        keep_tokens=0, image_size=plan.baseline.image_size, context_length=plan.baseline.context_length,
    )  # fmt: skip
    model = baseline.model if baseline else config.model
    full_towers = describe_towers(model) if baseline else towers
    return [*speeds, measure_phase(replace(config, model=model), full, full_towers, device, batch, seconds)]


def _add_hours(report: dict, plan: Plan, rates: list[float]) -> None:
    """Hours of one device, from the FLOP/s of every phase and, last, of the baseline."""
    for entry, cost, rate in zip(report["phases"], plan.phases, rates, strict=False):
        entry["device_hours"] = cost.device_flops / rate / 3600
    report["device_hours"] = sum(entry["device_hours"] for entry in report["phases"])
    hours = plan.baseline.device_flops / rates[-1] / 3600 if plan.baseline else None
    report["baseline_device_hours"] = hours
    report["time_saving"] = hours / report["device_hours"] if hours else None


def format_report(report: dict) -> str:
    """The report as text: a table of the phases, then totals, one fact a line."""
    unit, size = _flop_unit(report["training_flops"])
    lines = [*_phase_table(report), ""]
    lines.append(
        f"{report['parameters'] / 1e6:.1f} M parameters; memory is an estimate for each of {report['devices']} "
        f"device(s) in {report['precision']}; GFLOP are forward, of one sample"
    )
    lines.append(
        f"training, both towers     {report['training_flops'] / size:,.4g} {unit}, {_count(report['samples'])} pairs"
    )
    lines.append(f"  similarity matrices     {report['loss_flops'] / size:,.4g} {unit} more")
    if report["teacher_flops"]:
        lines.append(f"  the teacher's passes    {report['teacher_flops'] / size:,.4g} {unit} more (as large a tower)")
    if report["recompute_flops"]:
        lines.append(f"  second forward pass     {report['recompute_flops'] / size:,.4g} {unit} more (micro batches)")
    lines += _baseline_lines(report, unit, size)
    if "device_hours" in report:
        compared = ""
        if report["baseline"]:
            compared = f", baseline {report['baseline_device_hours']:,.4g}: {report['time_saving']:.2f}x"
        lines.append(f"device-hours              {report['device_hours']:,.4g}{compared}")
    for name, item in [(p["name"], p) for p in report["phases"]] + [("baseline", report["baseline"] or {})]:
        if "measured" in item:
            m = item["measured"]
            lines.append(
                f"measured, {name}: {m['pairs_per_second']:,.4g} pairs/s, {m['flops_per_second'] / 1e12:.4g} TFLOP/s "
                f"({m['steps']} steps of {m['batch']} on {m['device']})"
            )
    return "\n".join(lines)


def _baseline_lines(report: dict, unit: str, size: float) -> list[str]:
    """What full resolution would cost; none where nothing is below it."""
    base = report["baseline"]
    if not base:
        return []
    return [
        f"full-resolution baseline  {base['training_flops'] / size:,.4g} {unit}: {base['steps']:,} steps at "
        f"{base['image_size']} px with {base['context_length']} text tokens",
        f"saving                    {report['saving']:.2f}x in training FLOPs",
        *_finetune_lines(report["phases"], base["image_size"]),
    ]


def _phase_table(report: dict) -> list[str]:
    """One line a phase."""
    unit, size = _flop_unit(report["training_flops"])
    timed, limited = "device_hours" in report, "micro_batch_that_fits" in report["phases"][0]
    head = ["phase", "steps", "px", "image tokens", "text tokens", "batch", "pairs", "image GFLOP", "text GFLOP",
            f"training {unit}", "share", "memory GB"]  # fmt: skip
    head += ["fitting micro batch"] * limited + ["device-hours"] * timed
    rows = []
    for p in report["phases"]:
        row = [p["name"], f"{p['steps']:,}", str(p["image_size"]), str(p["image_tokens"]), str(p["text_tokens"]),
               f"{p['batch_size']:,}", _count(p["samples"]), f"{p['image_forward_flops'] / 1e9:.3g}",
               f"{p['text_forward_flops'] / 1e9:.3g}", f"{p['training_flops'] / size:,.4g}",
               f"{p['training_flops'] / report['training_flops']:.0%}", f"{p['memory_bytes'] / 1e9:,.3g}"]  # fmt: skip
        if limited:
            row.append(f"{p['micro_batch_that_fits']:,}" if p["micro_batch_that_fits"] else "none")
        if timed:
            row.append(f"{p['device_hours']:,.4g}")
        rows.append(row)
    return _table(head, rows)


def _finetune_lines(phases: list[dict], full_size: int) -> list[str]:
    """What phases at full resolution or above cost, in units of those below it."""
    main = sum(p["training_flops"] for p in phases if p["image_size"] < full_size)
    return [
        f"finetune at {p['image_size']} px        {p['training_flops'] / main:.2g}x the cost of the smaller phases"
        for p in phases
        if main and p["image_size"] >= full_size
    ]


def _flop_unit(flops: int) -> tuple[str, float]:
    """The unit that keeps a table of such totals readable."""
    units = {"EFLOP": 1e18, "PFLOP": 1e15, "TFLOP": 1e12}
    return next((item for item in units.items() if flops >= item[1]), ("TFLOP", 1e12))


def _count(number: int) -> str:
    """Short: 9.01 B, 25.6 M, 12.8 k."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Columns aligned, the first to the left; headings of several words stand on two lines."""
    upper = [name.rpartition(" ")[0] for name in head]
    lower = [name.rpartition(" ")[2] for name in head]
    all_rows = [upper, lower, *rows]
    widths = [max(len(row[i]) for row in all_rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in all_rows
    ]
    return [line.rstrip() for line in [*lines[:2], "-" * len(lines[1]), *lines[2:]]]
