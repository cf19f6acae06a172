"""Excel files, written as the format demands and no more."""

import io
import zipfile
from collections.abc import Iterable
from xml.sax.saxutils import escape

SHEET = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"


def workbook(sheets: dict[str, Iterable[Iterable[object]]]) -> bytes:
    """Return an Excel file of sheets by name, each of rows of cells; None leaves a cell out."""
    names = "".join(f'<sheet name="{name}" sheetId="{n}" r:id="r{n}"/>' for n, name in enumerate(sheets, 1))
    types = f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="xml" ContentType="application/xml"/></Types>'
    targets = {f"r{n}": ("worksheet", f"worksheets/sheet{n}.xml") for n in range(1, len(sheets) + 1)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("[Content_Types].xml", types)
        archive.writestr("_rels/.rels", _links({"r1": ("officeDocument", "xl/workbook.xml")}))
        archive.writestr("xl/workbook.xml", f'<workbook {SHEET} xmlns:r="{OFFICE}"><sheets>{names}</sheets></workbook>')
        archive.writestr("xl/_rels/workbook.xml.rels", _links(targets))
        for number, rows in enumerate(sheets.values(), 1):
            content = "".join(_row(place, cells) for place, cells in enumerate(rows, 1))
            archive.writestr(
                f"xl/worksheets/sheet{number}.xml", f"<worksheet {SHEET}><sheetData>{content}</sheetData></worksheet>"
            )
    return buffer.getvalue()


def _links(targets: dict[str, tuple[str, str]]) -> str:
    links = (f'<Relationship Id="{id}" Type="{OFFICE}/{kind}" Target="{to}"/>' for id, (kind, to) in targets.items())
    return f'<Relationships xmlns="{PACKAGE}/relationships">{"".join(links)}</Relationships>'


def _row(place: int, cells: Iterable[object]) -> str:
    written = (_cell(f"{chr(65 + n)}{place}", cell) for n, cell in enumerate(cells) if cell is not None)
    return f'<row r="{place}">{"".join(written)}</row>'


def _cell(place: str, value: object) -> str:
    if isinstance(value, bool):
        return f'<c r="{place}" t="b"><v>{int(value)}</v></c>'
    if isinstance(value, int | float):
        return f'<c r="{place}"><v>{value}</v></c>'
    return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{escape(value)}</t></is></c>'
