"""The READMEs' picture of speed and memory, as SVG: text and bars, so that it is the same on every machine."""

from html import escape

from benchmarks import measure

RESULT = "throughput-bloom-154m-cpu"  # in benchmarks/results
WAYS = ("plain", "padded", "trl-padded", "trl-packed", "ours", "ours-packed")
TEXTS = {
    "speed.svg": {
        "title": "Fine-tuning BLOOM: speed and memory",
        "about": "154M parameters, the full vocabulary of 250,880 entries, fp32; {processor}",
        "speed": "tokens per second",
        "memory": "peak memory, GiB",
        "plain": "Plain recipe, 8 accumulated",
        "padded": "Plain recipe, batches of 8",
        "trl-padded": "TRL, batches of 8",
        "trl-packed": "TRL, packed: examples leak",
        "ours": "This project",
        "ours-packed": "This project, packed",
    },
    "speed_zh.svg": {
        "title": "微调 BLOOM：速度与内存",
        "about": "1.54 亿参数，250,880 项的完整词表，fp32；{processor}",
        "speed": "每秒 token 数",
        "memory": "内存峰值（GiB）",
        "plain": "普通做法，累积 8 次",
        "padded": "普通做法，batch 为 8",
        "trl-padded": "TRL，batch 为 8",
        "trl-packed": "TRL，packing：样本互相泄漏",
        "ours": "本项目",
        "ours-packed": "本项目，packing",
    },
}
FONTS = "system-ui, Helvetica, Arial, 'Noto Sans SC', 'PingFang SC', 'Microsoft YaHei', sans-serif"
WIDTH, LEFT, TOP, PITCH, THICKNESS = 880, 250, 112, 38, 24
SPEED_WIDTH, GAP, MEMORY_WIDTH = 330, 70, 150
OURS, OTHERS, INK, FAINT = "#4f46e5", "#b6bccb", "#1f2937", "#6b7280"


def pictures_of(result: dict) -> dict[str, str]:
    """Return the SVG of a saved result of `benchmarks.throughput` for each file name in TEXTS."""
    drawn = {}
    for name, texts in TEXTS.items():
        about = texts["about"].format(processor=result["processor"])
        drawn[name] = svg_of(result["results"], {**texts, "about": about})
    return drawn


def svg_of(results: dict[str, dict], texts: dict[str, str]) -> str:
    """Return one picture: a bar of speed and a bar of peak memory for each way."""
    speeds = {way: results[way]["tokens"] / results[way]["seconds"] for way in WAYS}
    sizes = {way: results[way]["peak_bytes"] / measure.GIB for way in WAYS}
    height = TOP + PITCH * len(WAYS) + 12
    second = LEFT + SPEED_WIDTH + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="{FONTS}">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        _text(24, 36, texts["title"], 20, INK, "600"),
        _text(24, 60, texts["about"], 14, FAINT),
        _text(LEFT, TOP - 14, texts["speed"], 13, FAINT),
        _text(second, TOP - 14, texts["memory"], 13, FAINT),
    ]
    for place, way in enumerate(WAYS):
        y, colour = TOP + PITCH * place, OURS if way.startswith("ours") else OTHERS
        weight = "600" if way.startswith("ours") else "400"
        parts.append(_text(LEFT - 12, y + 17, texts[way], 14, INK, weight, "end"))
        parts += _bar(LEFT, y, SPEED_WIDTH * speeds[way] / max(speeds.values()), f"{speeds[way]:,.0f}", colour)
        parts += _bar(second, y, MEMORY_WIDTH * sizes[way] / max(sizes.values()), f"{sizes[way]:.2f}", colour)
    return "\n".join([*parts, "</svg>\n"])


def _bar(x: int, y: int, width: float, label: str, colour: str) -> list[str]:
    bar = f'<rect x="{x}" y="{y}" width="{width:.0f}" height="{THICKNESS}" rx="3" fill="{colour}"/>'
    return [bar, _text(x + round(width) + 8, y + 17, label, 14, INK)]


def _text(x: int, y: int, text: str, size: int, colour: str, weight: str = "400", anchor: str = "start") -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'
