"""Tomorrow's weather from those who know it: the model asks the Japan Meteorological Agency instead of inventing.

The caller asks 「明日の東京の天気は？」; the model calls `weather_forecast` and says what the agency forecasts and when
it issued that. Any prefecture, city, town or village of Japan will do; a name that several places have is asked back.
When no forecast can be had, the model is told so, and told to invent none.

Settings: WEATHER_URL, where the agency's documents are, for a mirror or a test (default https://www.jma.go.jp/bosai).
Nothing is written to disk; documents are kept in memory for ten minutes. They may be used if the source is named, as
every result does (出典：気象庁ホームページ). Nobody promises that they stay: expect absence, delay and change.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import unicodedata
import urllib.request
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone
from typing import Annotated, Any, Literal, get_args

log = logging.getLogger("weather")

URL = os.environ.get("WEATHER_URL", "").strip().rstrip("/") or "https://www.jma.go.jp/bosai"
LIMIT_S = 2.0  # for each of the two documents: the caller hears silence meanwhile
KEEP_S = 600.0
JST = timezone(timedelta(hours=9))  # Japan has no summer time
NO_FORECAST = "There is no forecast to be had now. Tell the caller so. Do not guess or invent any weather."

Weekday = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
Day = Literal["today", "tomorrow", "day_after_tomorrow", Weekday]


def weather_forecast(
    place: Annotated[str, "Prefecture, city, town or village in Japan, in Japanese: 東京都, 横浜市 or 広島県府中市"],
    day: Annotated[Day, "By the date in Japan. A weekday means the next one, or today"] = "today",
) -> dict[str, Any] | str:
    """The Japan Meteorological Agency's forecast for a place in Japan: today, tomorrow, or any day within a week.

    Always use this when weather is asked for; never answer from memory. Say that it is the agency's (気象庁) forecast
    and when it was issued. null means that the agency does not say. Of the temperatures, say the nearest station's.
    """
    try:
        return forecast(place, day, now())
    except Exception as fault:  # no network, too slow, not JSON, of another form: to the caller it is all the same
        log.warning("no forecast from %s: %s: %s", URL, type(fault).__name__, fault)
        return NO_FORECAST


def now() -> datetime:
    return datetime.now(JST)


def forecast(asked: str, day: str, at: datetime) -> dict[str, Any] | str:
    areas = document("/common/const/area.json")
    places = find(asked, areas)
    if not places:
        return f"There is no forecast for {asked}. Name a city or prefecture of Japan in Japanese: 横浜市 or 東京都."
    if len(set(places.values())) > 1:
        return {"question": "Ask the caller which of these is meant.", "places": list(places)}
    place, area = next(iter(places.items()))
    office = areas["class10s"][area]["parent"]
    days, week = document(f"/forecast/data/forecast/{OTHER_DOCUMENT.get(office, office)}.json")
    ahead = get_args(Day).index(day)
    if day in get_args(Weekday):
        ahead = (get_args(Weekday).index(day) - at.weekday()) % 7
    told = tell(area, at.date() + timedelta(days=ahead), at, days, week)
    return {"place": place, **told} if told else NO_FORECAST


documents: dict[str, tuple[float, Any]] = {}  # path -> until when it is kept (time.monotonic()), what it says


def document(path: str) -> Any:
    if path not in documents or documents[path][0] <= time.monotonic():
        with urllib.request.urlopen(URL + path, timeout=LIMIT_S) as response:
            documents[path] = time.monotonic() + KEEP_S, json.load(response)
    return documents[path][1]


# ── Places ───────────────────────────────────────────────────────────────────────────────────────────────────────

OTHER_DOCUMENT = {"014030": "014100", "460040": "460100"}  # offices whose forecast stands in another's document


def named(areas: Any) -> Iterator[tuple[str, str]]:
    """Everything in the agency's list that has a name, with the code of the area it lies in."""
    for office in areas["offices"].values():
        yield office["name"], office["children"][0]  # a prefecture: the first of its areas has the capital
    for code, area in areas["class10s"].items():
        yield area["name"], code
    for region in areas["class15s"].values():
        yield region["name"], region["parent"]
    for town in areas["class20s"].values():
        yield town["name"], areas["class15s"][town["parent"]]["parent"]


def plain(name: str) -> str:
    """As names are compared and shown: 茅ケ崎市 for 茅ヶ崎市, 鹿児島県 for 鹿児島県（奄美地方除く）."""
    return re.sub(r"\s|\(.*", "", unicodedata.normalize("NFKC", name)).replace("ヶ", "ケ")


def find(asked: str, areas: Any) -> dict[str, str]:
    """The places that may be meant, and for each the code of the area it lies in, for which forecasts are made."""
    asked = re.sub("(?<=市).+区$", "", plain(asked))  # 横浜市青葉区: the list has cities whole
    # By the first two digits of every code. Two prefectures have several offices, and none that is named after it.
    prefectures = {code[:2]: plain(office["name"]) for code, office in sorted(areas["offices"].items())}
    prefectures |= {"01": "北海道", "47": "沖縄県"}
    found: dict[str, tuple[int, str]] = {}
    for name, area in named(areas) if asked else ():
        name, prefecture = plain(name), prefectures[area[:2]]
        wanted = re.escape(asked.removeprefix(prefecture) or asked)
        # 横浜 is 横浜市. Of a city in parts, 仙台市東部 and 仙台市西部, the first stands for 仙台 and 仙台市.
        if match := re.match(f"{wanted}(地方|[都府県市区町村]|(?<=[市区])|$)", name):
            rank = 0 if re.search("[市区]", name) else 1 if name == prefecture else 2  # rather 横浜市 than 横浜町
            found.setdefault(name if name == prefecture else prefecture + match.group(), (rank, area))
    likeliest = min(found.values(), default=(0, ""))[0]
    return {place: area for place, (rank, area) in found.items() if rank == likeliest}


# ── The forecast ─────────────────────────────────────────────────────────────────────────────────────────────────

# What the week's codes mean. There are more, with times of day, but not for the week.
TELOPS = """100晴れ 101晴れ時々くもり 102晴れ一時雨 103晴れ時々雨 104晴れ一時雪 105晴れ時々雪 106晴れ一時雨か雪
107晴れ時々雨か雪 108晴れ一時雨か雷雨 110晴れのち時々くもり 111晴れのちくもり 112晴れのち一時雨 113晴れのち時々雨
114晴れのち雨 115晴れのち一時雪 116晴れのち時々雪 117晴れのち雪 118晴れのち雨か雪 119晴れのち雨か雷雨
140晴れ時々雨で雷を伴う 160晴れ一時雪か雨 170晴れ時々雪か雨 181晴れのち雪か雨 200くもり 201くもり時々晴れ
202くもり一時雨 203くもり時々雨 204くもり一時雪 205くもり時々雪 206くもり一時雨か雪 207くもり時々雨か雪
208くもり一時雨か雷雨 209霧 210くもりのち時々晴れ 211くもりのち晴れ 212くもりのち一時雨 213くもりのち時々雨
214くもりのち雨 215くもりのち一時雪 216くもりのち時々雪 217くもりのち雪 218くもりのち雨か雪 219くもりのち雨か雷雨
240くもり時々雨で雷を伴う 250くもり時々雪で雷を伴う 260くもり一時雪か雨 270くもり時々雪か雨 281くもりのち雪か雨 300雨
301雨時々晴れ 302雨時々やむ 303雨時々雪 304雨か雪 306大雨 308雨で暴風を伴う 309雨一時雪 311雨のち晴れ 313雨のちくもり
314雨のち時々雪 315雨のち雪 316雨か雪のち晴れ 317雨か雪のちくもり 340雪か雨 350雨で雷を伴う 361雪か雨のち晴れ
371雪か雨のちくもり 400雪 401雪時々晴れ 402雪時々やむ 403雪時々雨 405大雪 406風雪が強い 407暴風雪 409雪一時雨
411雪のち晴れ 413雪のちくもり 414雪のち雨 450雪で雷を伴う"""


def tell(area: str, wanted: date, at: datetime, days: Any, week: Any) -> dict[str, Any] | None:
    """What the agency says of a day: the next two or three in words, in `days`; the others in codes, in `week`."""
    by_area, codes = said(days, "weathers", wanted), said(week, "weatherCodes", wanted)
    # The week joins some areas: 中部・南部, 沿岸, or the whole prefecture.
    in_week = area if area in codes else next(code for code in codes if code not in by_area)
    part, (name, weather) = days, by_area[area]
    words = [text.replace("\u3000", " ") for text in weather.values()]
    if not words:
        part, (name, weather) = week, codes[in_week]
        words = [entry[3:] for entry in TELOPS.split() if entry[:3] in weather.values()]
    if not words:
        return None

    rain = {}
    for start, chance in said(days, "pops", wanted)[area][1].items():
        if at < start + timedelta(hours=6):
            rain[f"{start.hour}時から{start.hour + 6}時"] = f"{chance}%"
    if not rain:
        for chance in said(week, "pops", wanted)[in_week][1].values():
            rain["一日"] = f"{chance}%"
    issued = datetime.fromisoformat(part["reportDatetime"])
    return {
        "area": name,
        "date": spoken(wanted),
        "weather": words[0],
        "chance_of_rain": rain or None,
        "celsius_by_station": temperatures(wanted, days, week) or None,
        "issued": f"{part['publishingOffice']} {spoken(issued)}{issued.hour}時{issued.minute:02}分発表（日本時間）",
        "source": "気象庁 (Japan Meteorological Agency)。出典：気象庁ホームページ",
    }


def temperatures(wanted: date, days: Any, week: Any) -> dict[str, dict[str, int | None]]:
    """Minimum and maximum by station. Which area a station stands for is nowhere said, but the model can tell."""
    found: dict[str, dict[str, int | None]] = {}
    for code, (station, low) in said(week, "tempsMin", wanted).items():
        for start, text in said(week, "tempsMax", wanted)[code][1].items():
            found[station] = {"minimum": int(low[start]), "maximum": int(text)}
    for station, degrees in said(days, "temps", wanted).values():
        by_hour = {start.hour: int(text) for start, text in degrees.items()}
        if by_hour:  # 9 o'clock has the maximum, 0 o'clock the minimum; but today's stands for nothing
            today = datetime.fromisoformat(days["reportDatetime"]).date() == wanted
            found[station] = {"minimum": None if today else by_hour.get(0), "maximum": by_hour.get(9)}
    return found


def said(part: Any, key: str, wanted: date) -> dict[str, tuple[str, dict[datetime, str]]]:
    """What a document says of a day: by code of the area or station, its name and the texts by time."""
    [series] = [one for one in part["timeSeries"] if key in one["areas"][0]]
    starts = [datetime.fromisoformat(text) for text in series["timeDefines"]]
    told = {}
    for entry in series["areas"]:
        texts = zip(starts, entry[key], strict=True)
        on_the_day = {start: text for start, text in texts if text and start.date() == wanted}
        told[entry["area"]["code"]] = entry["area"]["name"], on_the_day
    return told


def spoken(day: date) -> str:
    return f"{day.month}月{day.day}日（{'月火水木金土日'[day.weekday()]}）"


TOOLS = [weather_forecast]
if not URL.startswith(("https://", "http://")):
    log.error("WEATHER_URL must begin with https:// or http://: mend it or unset it; until then there is no weather")
    TOOLS = []
