"""hooks/weather.py, against a pretend agency that serves real documents of February 2022."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from conftest import HOOKS, Loaded, LoadHook, PretendCall, refused

SAMPLE = HOOKS / "_jma_sample.json"  # a few places of the documents
AREAS = "/common/const/area.json"
TOKYO = "/forecast/data/forecast/130000.json"


class Agency(ThreadingHTTPServer):
    """The pretend agency, with what `serve` gave it; for None a byte every 50 ms, for ever."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.documents: dict[str, Any] = json.loads(SAMPLE.read_bytes())
        self.asked: list[str] = []
        self.served: dict[str, bytes | None] = {}
        self.delay_s = 0.0
        self.closing = threading.Event()

    def serve(self, path: str, document: str | bytes | None) -> None:
        self.served[path] = (
            json.dumps(self.documents[document]).encode() if isinstance(document, str) else document
        )


class Answer(BaseHTTPRequestHandler):
    server: Agency

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.closing.wait(self.server.delay_s)
        body = self.server.served.get(self.path, b"not here")
        self.send_response(200 if self.path in self.server.served else 404)
        self.end_headers()
        try:
            if body is not None:
                self.wfile.write(body)
            while body is None and not self.server.closing.wait(0.05):
                self.wfile.write(b" ")
        except OSError:
            pass  # nobody waits for it any more

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def agency() -> Iterator[Agency]:
    server = Agency()
    server.serve(AREAS, "area.json")
    server.serve(TOKYO, "forecast-130000-0500.json")
    server.serve("/forecast/data/forecast/070000.json", "forecast-070000-1100.json")
    server.serve("/forecast/data/forecast/200000.json", "forecast-200000-0500.json")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join(2)


Ask = Callable[..., Any]


@pytest.fixture
def weather(agency: Agency, hook: LoadHook, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return hook("weather", WEATHER_URL=agency.url)


@pytest.fixture
def ask(weather: Loaded) -> Ask:
    """Call the tool as the model does, in February 2022; text that is JSON comes back read."""

    async def asked(place: str, day: str = "tomorrow", at: str = "2022-02-22 08:00") -> Any:
        weather.module.now = lambda: datetime.fromisoformat(at + "+09:00")
        async with asyncio.timeout(5):
            arguments = json.dumps({"place": place, "day": day})
            text = await weather.host.run_tool(PretendCall(), "weather_forecast", arguments)
        return json.loads(text) if text.startswith("{") else text

    return asked


def known_places(weather: Loaded) -> Any:
    """What weather.py has made of the list of areas."""
    return weather.module.documents[AREAS][1].result()


async def test_forecast(ask: Ask) -> None:
    """What the agency says of tomorrow, and when it said so."""
    told = await ask("東京", "tomorrow")
    assert told == {
        "place": "東京都",
        "area": "東京地方",
        "other_areas": ["伊豆諸島北部", "伊豆諸島南部", "小笠原諸島"],
        "date": "2月23日（水）",
        "weather": "晴れ 昼過ぎ から 時々 くもり",
        "chance_of_rain": {
            "0時から6時": "0%",
            "6時から12時": "0%",
            "12時から18時": "10%",
            "18時から24時": "10%",
        },
        "temperature": {"station": "東京", "minimum_celsius": 0, "maximum_celsius": 9},
        "issued": "気象庁 2月22日（火）5時00分発表（日本時間）",
        "source": "気象庁 (Japan Meteorological Agency)。出典：気象庁ホームページ",
    }


@pytest.mark.parametrize(
    ("names", "office"),
    [
        ("東京 東京都 Tokyo TOKYO とうきょう トウキョウ tōkyō 千代田区 八丈島", "130000"),
        ("東京都千代田区", "130000"),
        ("横浜 横浜市 Yokohama よこはま ﾖｺﾊﾏ Yokohama-shi 横浜市青葉区", "140000"),
        ("神奈川県 かながわけん Kanagawa 茅ヶ崎 茅ケ崎", "140000"),
        ("札幌 Sapporo さっぽろ 札幌市中央区 北海道札幌市 札幌市（北海道）", "016000"),
        ("大阪 大阪市 大阪府 Osaka ōsaka Oosaka おおさか Osaka-fu", "270000"),
        ("那覇 Naha なは 沖縄県那覇市", "471000"),
        ("仙台 Sendai せんだい 仙台市西部 宮城県", "040000"),
        ("山形 Yamagata やまがた", "060000"),
        ("佐世保 Sasebo させぼ", "420000"),
        # 奄美 and 十勝 have no document of their own.
        ("奄美 奄美市 Amami あまみ 奄美地方 鹿児島 鹿児島県 Kagoshima", "460100"),
        ("帯広 Obihiro 十勝 釧路 Kushiro くしろ", "014100"),
    ],
)
async def test_names(ask: Ask, weather: Loaded, agency: Agency, names: str, office: str) -> None:
    """A place is known by any of its names."""
    for name in names.split():
        agency.asked.clear()
        await ask(name)
        weather.module.documents.pop(f"/forecast/data/forecast/{office}.json")
        assert agency.asked[-1:] == [f"/forecast/data/forecast/{office}.json"], name


async def test_every_municipality(ask: Ask, weather: Loaded, agency: Agency) -> None:
    """Each is found by its kanji, kana and roman names."""
    await ask("東京")
    areas = agency.documents["area.json"]
    places, prefectures = known_places(weather), set()
    for code, town in areas["class20s"].items():
        area = areas["class15s"][town["parent"]]["parent"]
        if code.endswith("00"):  # not one of the parts of a divided one
            office = areas["class10s"][area]["parent"]
            prefecture = areas["offices"][office]["name"]
            prefecture = {"01": "北海道", "47": "沖縄県"}.get(code[:2], prefecture)
            prefecture = "鹿児島県" if code.startswith("46") else prefecture
            prefectures.add(prefecture)
            for name in (town["name"], town["kana"], town["enName"]):
                found = weather.module.find(f"{prefecture} {name}", places)
                assert area in [place.area for place in found], (prefecture, name)
    assert prefectures <= {place.prefecture for same in places.values() for place in same}


async def test_minimum(ask: Ask, weather: Loaded, agency: Agency) -> None:
    """It is that of the morning; today's is not told."""
    this_morning = (await ask("東京", "today"))["temperature"]
    assert this_morning == {"station": "東京", "minimum_celsius": None, "maximum_celsius": 10}
    agency.serve(TOKYO, "forecast-130000-1700.json")
    weather.module.documents.clear()
    this_evening = (await ask("東京", "today", at="2022-02-22 18:00"))["temperature"]
    assert this_evening is None  # it tells of tomorrow only
    after_midnight = (await ask("東京", "today", at="2022-02-23 01:00"))["temperature"]
    assert after_midnight == {"station": "東京", "minimum_celsius": -1, "maximum_celsius": 9}


async def test_past_hours(ask: Ask) -> None:
    """What is past of today is not told."""
    for at, first in (("2022-02-22 05:10", "6時から12時"), ("2022-02-22 12:00", "12時から18時")):
        assert list((await ask("東京", "today", at=at))["chance_of_rain"])[0] == first


@pytest.mark.parametrize(
    ("place", "at", "area", "station", "minimum", "maximum"),
    [
        ("いわき", "2022-02-22 12:00", "浜通り", "小名浜", -3, 5),
        ("相馬", "2022-02-22 12:00", "浜通り", "相馬", -4, 3),
        ("会津若松", "2022-02-22 12:00", "会津", "若松", -3, 1),
        ("長野県", "2022-02-25 09:00", "北部", "長野", -6, 9),
        ("松本", "2022-02-25 09:00", "中部", "松本", -6, 10),
        # The third area, but the fourth station.
        ("飯田", "2022-02-25 09:00", "南部", "飯田", -5, 10),
        ("長野県南部", "2022-02-25 09:00", "南部", "飯田", -5, 10),
        ("軽井沢", "2022-02-25 09:00", "中部", "軽井沢", -10, 6),
        ("小笠原", "2022-02-22 08:00", "小笠原諸島", "父島", 14, 19),
    ],
)
async def test_station(
    ask: Ask, place: str, at: str, area: str, station: str, minimum: int, maximum: int
) -> None:
    """A temperature is that of a station in the area, and names it."""
    told = await ask(place, "tomorrow", at)
    assert told["area"] == area
    assert list(told["temperature"].values()) == [station, minimum, maximum]


async def test_codes(ask: Ask) -> None:
    """A day that the agency tells in codes is put into words."""
    told = await ask("飯田", "sunday", at="2022-02-25 09:00")
    assert (told["date"], told["area"]) == ("2月27日（日）", "中部・南部")
    assert told["weather"] == "くもり時々晴れ"
    assert told["chance_of_rain"] == {"一日": "30%"}
    assert told["temperature"] == {"station": "松本", "minimum_celsius": 0, "maximum_celsius": 9}
    # The week's, not the morning's.
    assert told["issued"] == "長野地方気象台 2月24日（木）17時00分発表（日本時間）"
    assert (await ask("東京", "day_after_tomorrow"))["weather"] == "晴れ時々くもり"
    assert (await ask("会津若松", "saturday", at="2022-02-22 12:00"))["weather"] == "くもり時々晴れ"


async def test_weekday(ask: Ask) -> None:
    """A weekday is the next one, or today."""
    assert [(await ask("東京", day))["date"] for day in ("tuesday", "wednesday", "monday")] == [
        "2月22日（火）", "2月23日（水）", "2月28日（月）",
    ]  # fmt: skip


def test_time_zone(weather: Loaded) -> None:
    """Today is by the date in Japan."""
    assert weather.module.now().utcoffset() == timedelta(hours=9)


async def test_ambiguous_name(ask: Ask) -> None:
    """A name of several places is asked back, and the answer understood."""
    assert (await ask("府中"))["places"] == ["府中市（東京都）", "府中市（広島県）"]
    assert (await ask("伊達市"))["places"] == ["伊達市（北海道）", "伊達市（福島県）"]
    assert len((await ask("北海道"))["places"]) > 1
    for answer in ("府中市（東京都）", "東京都府中市", "東京の府中", "Fuchu, Tokyo"):
        assert (await ask(answer))["place"] == "府中市（東京都）"
    assert (await ask("福島県伊達市", at="2022-02-22 12:00"))["area"] == "中通り"


async def test_likeliest_place(ask: Ask, weather: Loaded) -> None:
    """A city is meant rather than its prefecture or a town."""
    await ask("東京")
    meant = {"山口": "山口市", "山口県": "山口県", "Yokohama": "横浜市", "横浜町": "横浜町"}
    meant["仙台"] = "仙台市"
    for name, place in meant.items():
        assert [found.name for found in weather.module.find(name, known_places(weather))] == [place]


@pytest.mark.parametrize(
    "place", ["London", "ソウル", "月", "", "  ", "../../etc/passwd", "東" * 5000]
)
async def test_unknown_place(ask: Ask, agency: Agency, place: str) -> None:
    """An unknown place is said to be unknown."""
    told = await ask(place)
    assert told.startswith("There is no forecast for") and "東京都" in told
    assert agency.asked == [AREAS]


async def test_missing_day(ask: Ask) -> None:
    """No other day is told in place of one that is not there."""
    # The week has the 25th, but it is of the 21st.
    old = await ask("東京", "tomorrow", at="2022-02-24 08:00")
    assert "2月21日（月）" in old and "too old" in old and "invent" in old
    absent = await ask("東京", "today", at="2022-02-21 20:00")
    assert "does not tell of 2月21日（月）" in absent and "invent" in absent


@pytest.mark.parametrize(
    "garbage",
    [
        b"", b"<html>", b"[]", b"{}", b"null", b"[{}, {}]", b"[" * 100_000, b"\xff\xfe",
        b'[{"timeSeries": [{"areas": [{}]}]}, 1]',
    ],
)  # fmt: skip
async def test_garbage(ask: Ask, weather: Loaded, agency: Agency, garbage: bytes) -> None:
    """Garbage is no forecast."""
    agency.serve(TOKYO, garbage)
    assert "Do not guess or invent" in await ask("東京")
    agency.serve(AREAS, garbage)
    weather.module.documents.clear()
    assert "Do not guess or invent" in await ask("東京")


async def test_broken_document(ask: Ask, weather: Loaded, agency: Agency) -> None:
    """A broken document of the right form is no forecast."""
    whole = json.dumps(agency.documents["forecast-130000-0500.json"])
    changes = [("130010", "139999"), ('"9"', '"nine"'), ("T", "?T"), ('"10"', "10, 10")]
    for change in [*changes, ('"reportDatetime"', '"x"')]:
        agency.serve(TOKYO, whole.replace(*change).encode())
        weather.module.documents.clear()
        assert "Do not guess or invent" in await ask("東京"), change


async def test_empty_text(ask: Ask, agency: Agency) -> None:
    """An empty text is no value."""
    whole = json.dumps(agency.documents["forecast-130000-0500.json"])
    agency.serve(TOKYO, whole.replace('["10", "10", "0", "9"]', '["", "", "", ""]').encode())
    assert (await ask("東京", "today"))["temperature"] is None
    from_the_week = (await ask("東京", "tomorrow"))["temperature"]
    assert from_the_week["maximum_celsius"] == 9


@pytest.mark.parametrize("trouble", ["down", "both slow", "never ending"])
async def test_outage(ask: Ask, weather: Loaded, agency: Agency, trouble: str) -> None:
    """Nothing is invented, and nobody waits long."""
    assert weather.module.LIMIT_S == 3.0
    weather.module.LIMIT_S = 0.3
    if trouble == "down":
        weather.module.URL = "http://127.0.0.1:9"
    elif trouble == "both slow":
        agency.delay_s = 0.2  # each is within the limit, but not both
    else:
        agency.serve(TOKYO, None)
    began = time.monotonic()
    assert "Do not guess or invent" in await ask("東京")
    assert time.monotonic() - began < 0.45


async def test_endless_document(ask: Ask, weather: Loaded, agency: Agency) -> None:
    """A request that never ends is given up."""
    weather.module.LIMIT_S = 0.2
    agency.serve(TOKYO, None)
    await ask("東京")
    coming = weather.module.documents[TOKYO][1]
    assert isinstance(await asyncio.to_thread(coming.exception, 2), TimeoutError)


async def test_shared_request(ask: Ask, agency: Agency) -> None:
    """Many callers at once cost the agency one request for each document."""
    agency.delay_s = 0.1
    told = await asyncio.gather(*(ask("東京") for _ in range(20)))
    assert all(one == told[0] and one["place"] == "東京都" for one in told)
    assert agency.asked == [AREAS, TOKYO]


async def test_slow_document(ask: Ask, agency: Agency) -> None:
    """It does not hold up those who want another."""
    await ask("東京")
    agency.serve("/forecast/data/forecast/140000.json", None)
    waiting = asyncio.create_task(ask("横浜"))
    await asyncio.sleep(0.1)
    began = time.monotonic()
    assert (await ask("東京"))["place"] == "東京都"
    assert time.monotonic() - began < 0.2 and not waiting.done()
    waiting.cancel()


async def test_cache(ask: Ask, weather: Loaded, agency: Agency) -> None:
    """Documents are kept for ten minutes, and failures are not."""
    there = agency.served.pop(TOKYO)
    assert weather.module.KEEP_S == 600 and "invent" in await ask("東京")
    agency.served[TOKYO] = there
    assert (await ask("東京")) == (await ask("東京"))
    assert agency.asked == [AREAS, TOKYO, TOKYO]
    weather.module.KEEP_S = 0.0
    await ask("東京")
    assert agency.asked == [AREAS, TOKYO, TOKYO, AREAS, TOKYO]


async def test_logged_failure(ask: Ask, agency: Agency, caplog: pytest.LogCaptureFixture) -> None:
    """A failure is one line of the log."""
    agency.served.clear()
    await ask("東京")
    (record,) = [record for record in caplog.records if record.name == "weather"]
    told = (record.levelname, record.exc_info, getattr(record, "call", ""))
    assert told == ("WARNING", None, "CA1")
    assert "404" in caplog.text and agency.url in caplog.text


def test_wrong_setting(hook: LoadHook) -> None:
    """A wrong address stops the start."""
    refused(hook, "weather", WEATHER_URL="file:///etc")


def test_schema(weather: Loaded) -> None:
    """The model is told which days it may ask for."""
    (tool,) = weather.host.tools
    assert tool["parameters"]["required"] == ["place"]
    days = tool["parameters"]["properties"]["day"]["enum"]
    assert days[:4] == ["today", "tomorrow", "day_after_tomorrow", "monday"]


def test_every_code(weather: Loaded, agency: Agency) -> None:
    """Every code of the documents has words."""
    known = {word[:3] for word in weather.module.TELOPS.split()}
    forecasts = [one for name, one in agency.documents.items() if name.startswith("forecast")]
    weeks = json.dumps([week["timeSeries"][0] for _, week in forecasts])
    assert set(re.findall(r'"([1-4]\d\d)"', weeks)) <= known
