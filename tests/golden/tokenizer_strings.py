"""The 500 strings of make_golden.py's tokenizers target: hand-written ones, then seeded mixtures of their parts."""

import random

EDGES = ["", " ", "   ", "\n", "\t\t", " \n \t ", "a", "A", ".", "!!!", "\u00a0", "\u3000 \u2003", "\u200b", "\u0301", "\ufeff"]
EDGES += ["a\nb\r\nc\n\nd", "a \n b \t c", "tab\there\vvertical\fform\rreturn", "  leading", "trailing  ", "  both  "]
EDGES += ["trailing newline\n", "\nleading newline", "trailing nbsp\u00a0", "trailing ideographic\u3000", "</s> ", " </s>"]
EDGES += ["a" * 500, "ab" * 300, "a " * 400, "!" * 300, "😀" * 120, "猫" * 300, "\u0301" * 50, "word " * 75, "word " * 76]
EDGES += ["cat " * 74 + "end", "cat " * 75 + "end", "cat " * 76 + "end", "x" * 2000, "1234567890" * 40, "É" * 200, "\n" * 200]

LINES = """A cat playing with a ball of yarn
a cat playing with a ball of yarn
An astronaut riding a horse on Mars, photorealistic, 8k
three red apples on a blue background
A cat holding a sign that says hello world
It's a dog's life, isn't it? We've seen they're here; I'm sure he'll say I'd go.
IT'S A DOG'S LIFE, ISN'T IT? WE'VE SEEN THEY'RE HERE; I'M SURE HE'LL SAY I'D GO.
don’t “quote” me – or — do… 100€
a 1girl, masterpiece, (best quality:1.3), [blurry], {{detailed}}, <lora:foo:0.8>
<p>Hello <b>world</b> &amp; friends</p><br/>
&lt;tag&gt; &nbsp; &#39;quoted&#39; &eacute; &amp;amp;
https://example.org/a/b?c=d&e=%20f#g
user@example.org +1 (555) 010-9999
3.14159 2,718,281.828 1e-5 0x1F ½ ² ³ ⅷ ① ٣ ௧ 一二三
C++ & C# vs. F#; x == y && !z || w ? a : b
snake_case camelCase kebab-case SCREAMING_CASE __init__ a_b
日本の猫が毛糸で遊んでいる
一只猫在玩毛线球，背景是蓝色的。
고양이가 실뭉치를 가지고 놀고 있다
قطة تلعب بكرة من الصوف
مَرْحَبًا بِالعَالَم
חתול משחק בכדור צמר
кошка играет с клубком шерсти
Η γάτα παίζει με ένα κουβάρι ΣΊΣΥΦΟΣ
ऊन के गोले से खेलती बिल्ली
แมวเล่นกับลูกบอลไหมพรม
Một con mèo đang chơi với cuộn len
İstanbul'da ılık bir gün, IĞDIR
Straße STRASSE ẞ ﬁ ﬂ ﬃ Ǆ ǅ ǆ
😀😃😄
👩‍👩‍👧‍👦 family
👨🏽‍🚀 astronaut 👩🏿‍🔬
🏳️‍🌈🏴‍☠️🇫🇷🇯🇵
☕️ vs ☕︎, ❤️‍🔥, 1️⃣2️⃣#️⃣
\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f
cafe\u0301 vs caf\u00e9, n\u0303 \u00f1, u\u0308 \u00fc, A\u030a \u00c5 \u212b
Z\u0351\u036b\u0343a\u0300\u0301\u0302\u0303lgo
o\u0323\u0302 \u1ed9 o\u0302\u0323
ｆｕｌｌ－ｗｉｄｔｈ　ＡＢＣ　１２３！
ﾊﾝｶｸｶﾀｶﾅ が \u304b\u3099 \uff76\uff9e ガ
①②③ ㎏ ㏒ ㍿ ℃ ™ © ® № ﷺ
zero\u200bwidth non\u200cjoiner word\u2060joiner bom\ufeffhere soft\u00adhyphen
rtl\u200fmark ltr\u200emark \u202eoverride\u202c
nbsp\u00a0here em\u2003space thin\u2009space ogham\u1680space ideographic\u3000space
line\u2028sep para\u2029sep nel\u0085x
\x00nul \x01soh \x07bel \x08bs \x1besc \x7fdel \x80pad \x9fapc
fs\x1cgs\x1drs\x1eus\x1fend
\ufffdreplacement \ufffenonchar \U0010ffffmax \ue000private
𝔣𝔯𝔞𝔨𝔱𝔲𝔯 𝒔𝒄𝒓𝒊𝒑𝒕 𝟙𝟚𝟛 𐐀𐐨 𠜎𠜱 🀄
<|endoftext|>
<|startoftext|>
<|endoftext|><|endoftext|><|endoftext|>
<|startoftext|>a cat<|endoftext|>
a cat<|endoftext|>a dog
a cat <|endoftext|> a dog <|endoftext|>
<|ENDOFTEXT|> <|EndOfText|> <|StartOfText|> <| endoftext |>
<|STARTOFTEXT|>x<|startoftext|>y <|startoftext|> z
</s>
</s> a cat
a cat</s>
a cat </s> a dog</s>x
</s></s>  </s>
x<pad>y <pad> z
<pad><pad></s><unk><s>
<unk> unknown <unk>x
<extra_id_0> a <extra_id_1>b<extra_id_99> <extra_id_100>
<EXTRA_ID_0> </S> <PAD>
</s>  two spaces <extra_id_5>  two more
▁ ▁▁ a▁b ▁c
_ __ ___ a_b _c_
a  b   c    d     e
...,,,;;;:::!!!???
----====++++****////
!@#$%^&*()_+-=[]{}|;':",./<>?`~
'''' ''s 's 't 're 've 'm 'll 'd s' t'
'S 'T 'RE 'VE 'M 'LL 'D
a's b't c're d've e'm f'll g'd h'x i's's
’s ’t ’re it’s ʼs ＇s
123 1234 12345 1,234 1.5 v2.0.1 2nd 3D 4k 8K 16:9
ababababababababababab abcabcabcabc
supercalifragilisticexpialidocious antidisestablishmentarianism
Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch
wordWithEmoji😀inside and😀 😀and
中文English混合mixed文字
a,b.c;d:e!f?g
(a)[b]{c}<d>"e"'f'
$100 £200 ¥300 ₿4 ₹5
x² + y² = z², ∑ᵢ aᵢ ≤ ∞, ∀ε>0 ∃δ, √2 ≈ 1.414, α→β
naïve façade coöperate Zürich Łódź Kraków Ærøskøbing Þingvellir Dvořák
ĀāĒēĪī ŐőŰű ȘșȚț Ǎǎ ɐɓɔ ʰʲʷ
"quoted" back\\\\slash \\\\n not a newline
import numpy as np; print(f"{x:.2f}")  # comment
{"key": [1, 2.5, null, true], "s": "\\\\u00e9"}
SELECT * FROM t WHERE a='b' -- c
#hashtag @mention :emoji: /path/to/file.txt C:\\\\dir\\\\file.png
ⅠⅡⅢ ⅰⅱⅲ Ⓐⓑ ⁱⁿ ₁₂ ᴬᴮ
ა ბ გ Ა Ბ Გ Დ ዐ ក ខ བོད་ ᚠᚢᚦ ⴰⴱ ꦲꦏ Ꭰꭰ
ﻼ ﻻ ـــ ٠١٢٣ ۰۱۲۳ ،؛؟
क्षत्रिय ज्ञ श्री र्\u200dक क्\u200cष
กำ น้ำ เกม ๑๒๓
각 \u1100\u1161\u11a8 가\u11a8
ʜᴇʟʟᴏ H̲e̲l̲l̲o̲ ᵺ ỿ
⠓⠑⠇⠇⠕ ♔♕♖ ♠♥♦♣ ▀▄█ ┌─┐ ←↑→↓
¿Qué? ¡Olé! «guillemets» ‹x› „low“ ‚x‘
ΑΣ ΑΣ. ΑΣΑ Σ σς İ i\u0307 I\u0307
\u0958 \u2126 \uf900 \ufb1d \u0340 \u0344 \u1f71
photo of a woman, 35mm, f/1.8, ISO-100, 1/250s, --ar 16:9 --v 5
portrait | oil painting | by an old master :: 2 | ((dramatic)) light
A neon sign reading "OPEN 24/7" above a diner, rain, 1980s; shot on film…
""".replace("\\\\", "\\").splitlines()
# splitlines() also splits at U+2028, U+0085, \x1c and the like, which gives the parts on lines of their own as well

SUBJECTS = "a cat|an astronaut|three red apples|a giant lemon|the old robot|two yellow birds|a café|une forêt|ein Mädchen|日本庭園".split("|")
VERBS = "playing with|standing next to|holding|painted as|made of|dreaming about|that isn't|, without|&|vs.".split("|")
OBJECTS = "a ball of yarn|a sign that says \"hello\"|blue glass|42 balloons|its shadow|the moon 🌙|naïve art|<b>text</b>|$9.99|東京".split("|")
STYLES = "oil on canvas|35mm film grain|8k, ultra-detailed|in the style of ukiyo-e|(soft light:1.2)|it's cinematic|  |—|!!!|❤️".split("|")
GLUE = ["", " ", "  ", "\n", ", ", "\t", "\u00a0", "\u200d", "'s ", "</s>", "<|endoftext|>", "<pad>", "-", "_", "..."]


def characters(draw, count):
    ranges = [(32, 126)] * 6 + [(0, 31), (127, 0x17F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0xDFF)]
    ranges += [(0x1E00, 0x1FFF), (0x2000, 0x206F), (0x20A0, 0x24FF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)]
    ranges += [(0xF900, 0xFFEF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF)]
    return "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(count))


def strings(count=500):
    draw = random.Random(2024)
    out = list(dict.fromkeys(EDGES + LINES))
    seen = set(out)
    kinds = 0
    while len(out) < count:
        kinds += 1
        if kinds % 3 == 0:
            text = characters(draw, draw.randint(1, 30))
        elif kinds % 3 == 1:
            text = f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(OBJECTS)}, {draw.choice(STYLES)}"
            text = draw.choice([text, text, text.upper(), text.title(), " ".join([text] * 12)])
        else:
            parts = SUBJECTS + VERBS + OBJECTS + STYLES
            text = "".join(draw.choice(parts) + draw.choice(GLUE) for _ in range(draw.randint(2, 7)))
        if text not in seen:
            seen.add(text)
            out.append(text)
    return out
