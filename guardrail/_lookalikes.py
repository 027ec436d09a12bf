"""Characters that are drawn like Latin letters, or stand for them unseen.

A working subset of Unicode TR39's confusables, and the alphabets of "fancy text" generators
(currency signs, Cherokee, syllabics, hooks, bars). What NFKC folds anyway is not here.
"""

from __future__ import annotations

__all__ = ["HOMOGLYPHS", "SPELLED", "SYMBOLS"]

_DRAWN_LIKE = {
    "A": "ΑАⱭⲀ",
    "a": "ȺɑαаคᎪᎯᏘᗩᴀ₳ⱥⲁ卂ꓮꭺꭿꮨ",
    "B": "ƁΒБВᲪ",
    "b": "ƀƄƅɃɓʙβЬбвь฿ცᏰᏴᏸᏼᗷ乃ꓐ",
    "C": "ƇСⲤ",
    "c": "¢ƈȻȼςсᏟᏣᑕᴄ₵ⲥ匚ꓚꮯꮳ",
    "D": "ƉƊԀ",
    "d": "Đđɖɗԁ๔ᎠᎴᕍᗪᴅ∂ꓓꭰꮄ",
    "E": "ƐΕЄЕҼ",
    "e": "ɆɇɛεеєҽᎬᏋᗴᴇⲈⲉ乇ꓰꭼꮛ",
    "F": "Ƒ",
    "f": "ƒʄᎦᖴ₣千ꓝꜰꞘꞙꭶ",
    "G": "ƓꞬ",
    "g": "وǤǥɠɡɢᎶᏀᏳᏻᘜ₲ꓖꮆꮐ",
    "H": "ΗЂНҺ",
    "h": "ĦħɧʜнђһᎻᏂᕼⱧⱨⲎⲏ卄ꓧꮋꮒ",
    "I": "ΙІⲒꞮ",
    "i": "ıƗɨɩɪιіเᎥᎨⲓ丨ꓲꭵꭸ",
    "J": "ЈꞲ",
    "j": "ɈɉʝјנᎫᏠᒍᴊꓙꭻꮰ",
    "K": "ƘΚК",
    "k": "ƙκкҜҝᏦᛕᴋ₭ⲔⲕꓗꝀꝁꮶ",
    "L": "Ӏ",
    "l": "ŁłƖʅʟӏᏝᏞᒪⱠⱡㄥꓡꮭꮮ",
    "M": "ΜМⱮ",
    "m": "ɱм๓Ꮇᗰᴍ₥Ⲙⲙ爪ꓟꮇ",
    "N": "ŊΝИՈ",
    "n": "ŋɴηиոภᏁᑎ₦Ⲛⲛ几ꓠꮑ",
    "O": "ΟОⲞ",
    "o": "ØøσƟɵοо๏ᎤᎾᴏⲟㄖꓳꭴꮎ",
    "P": "ΡРⲢ",
    "p": "ρрקᎮᏢᑭᴘᵽ₱℘Ᵽⲣ卩ꓑꭾꮲ",
    "Q": "ǪҨԚԶ",
    "q": "ǫɊɋҩԛզᎧᑫꝖꝗꭷ",
    "R": "ƦГЯ",
    "r": "ɌɍɾʀгяᏒᖇᖈ尺ꓣꮢ",
    "S": "ЅꟅ",
    "s": "ʂѕടᏚᔕ₴丂ꜱꮪ",
    "T": "ƬƮΤТⲦꞭ",
    "t": "ŦŧƭɬʈτтᎢᏖᴛ₮ⲧㄒ丅ꓔꭲꮦ",
    "U": "ЦՍ",
    "u": "Ʉʉυцսยᑌᴜㄩꓴ",
    "V": "Ѵ",
    "v": "νѵש۷Ꮩᐯᴠꓦꮩ",
    "W": "ШЩԜ",
    "w": "ωшщԝฬᎳᗯᴡῳ₩山ꓪꮃ",
    "X": "ΧХҲӼ",
    "x": "χхҳӽ᙭Ⲭⲭ乂ꓫ",
    "Y": "ΥУҮᲧ",
    "y": "אɎɏʏγуүყᎩᎽㄚꓬꭹꮍ",
    "Z": "Ζ",
    "z": "ƵƶʐʑζᏃᴢⱫⱬ乙ꓜꮓ",
}

HOMOGLYPHS = {ord(char): letter for letter, chars in _DRAWN_LIKE.items() for char in chars}
"""For `str.translate`; they may be real letters of their own script."""

SYMBOLS = "".join(chr(code) for code in HOMOGLYPHS if not chr(code).isalpha())
"""Those that are no letters anywhere: signs of currencies and the like."""


def _run(first: int, last: int, start: str) -> dict[int, str]:
    """Code points `first` to `last` stand for the characters from `start` on."""
    return {code: chr(ord(start) + code - first) for code in range(first, last + 1)}


SPELLED = {
    **_run(0xE0020, 0xE007E, " "),  # tags: ASCII that nobody sees and language models read
    **_run(0xE0110, 0xE016E, " "),  # bytes hidden in variation selectors
    **_run(0x249C, 0x24B5, "a"),  # in parentheses
    **_run(0x1F110, 0x1F129, "A"),
    **_run(0x1F150, 0x1F169, "A"),  # white on black, in circles
    **_run(0x1F170, 0x1F189, "A"),  # and in squares
    **_run(0x1F1E6, 0x1F1FF, "A"),  # halves of flags
}
"""For `str.translate`; they always mean these characters."""
