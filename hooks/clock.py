"""What day and what time it is: a model does not know, and guesses.

The caller asks 「今、何時ですか」 or 「ニューヨークは今何時？」, or the model needs the date for
something else: it calls `current_time` and gets the date, the weekday and the time, in Japan or
elsewhere.

No settings, and nothing is stored. Japan's time needs nothing but a clock that is right. Other
times need the computer's time zone data; where there is none (Windows, very small containers),
`pip install tzdata` adds it.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Annotated, Any
from zoneinfo import ZoneInfo, available_timezones

JST = timezone(timedelta(hours=9))  # Japan has no summer time, so it needs no time zone data
JAPAN = (
    "", "日本", "東京", "大阪", "京都", "japan", "jst", "asia/tokyo", "tokyo", "osaka", "kyoto",
)  # fmt: skip
NAMES = {  # what callers say; the last part of a zone's own name (london) need not be here
    "Europe/London": "ロンドン イギリス 英国 uk england",
    "Europe/Paris": "パリ フランス france",
    "Europe/Berlin": "ベルリン ドイツ germany",
    "Europe/Rome": "ローマ イタリア italy",
    "Europe/Madrid": "マドリード スペイン spain",
    "America/New_York": "ニューヨーク ワシントン ボストン washington boston",
    "America/Chicago": "シカゴ",
    "America/Los_Angeles": "ロサンゼルス サンフランシスコ シアトル san_francisco seattle",
    "America/Vancouver": "バンクーバー",
    "America/Sao_Paulo": "サンパウロ",
    "Pacific/Honolulu": "ハワイ ホノルル hawaii",
    "Pacific/Guam": "グアム",
    "Australia/Sydney": "シドニー",
    "Asia/Seoul": "ソウル 韓国 korea south_korea",
    "Asia/Shanghai": "上海 北京 中国 beijing china",
    "Asia/Hong_Kong": "香港",
    "Asia/Taipei": "台北 台湾 taiwan",
    "Asia/Singapore": "シンガポール",
    "Asia/Bangkok": "バンコク タイ thailand",
    "Asia/Ho_Chi_Minh": "ハノイ ホーチミン ベトナム hanoi vietnam",
    "Asia/Manila": "マニラ フィリピン philippines",
    "Asia/Kolkata": "デリー インド delhi new_delhi india",
}


def current_time(
    place: Annotated[str, "Empty for Japan; else a large city, or a zone like Europe/London"] = "",
) -> dict[str, Any] | str:
    """The date, weekday and time now, in Japan or elsewhere. Always use it: you do not know."""
    zone = find_zone(place)
    if zone is None and not available_timezones():
        return "Only the time of Japan is known here (leave out the place). Say so; do not guess."
    if zone is None:
        return (
            f"The time zone of {place} is not known. In Japan, leave it out; else give a big city."
        )
    there = now().astimezone(zone)
    weekday = "月火水木金土日"[there.weekday()]
    era = f"（令和{there.year - 2018}年）" if zone is JST else ""
    return {
        "place": "日本" if zone is JST else f"{place} ({zone})",
        "date": f"{there.year}年{era}{there.month}月{there.day}日（{weekday}曜日）",
        "time": f"{there.hour}時{there.minute}分",
        "compared_to_japan": compared_to_japan(there.utcoffset() or timedelta()),
        "summer_time": bool(there.dst()),
    }


def now() -> datetime:
    return datetime.now(UTC)


def find_zone(place: str) -> tzinfo | None:
    name = place.strip().casefold().replace(" ", "_")
    if name in JAPAN:
        return JST
    for zone in sorted(available_timezones()):
        own = zone.casefold()
        if name in (own, own.rpartition("/")[2], *NAMES.get(zone, "").split()):
            return ZoneInfo(zone)
    return None


def compared_to_japan(offset: timedelta) -> str:
    minutes = round((offset - timedelta(hours=9)).total_seconds() / 60)
    if minutes == 0:
        return "日本と同じ"
    hours, rest = divmod(abs(minutes), 60)
    ahead = "進んでいる" if minutes > 0 else "遅れている"
    return f"日本より{hours}時間{f'{rest}分' if rest else ''}{ahead}"


TOOLS = [current_time]
