"""Texts as users have them: separators that end no line, and what plots, Markdown, HTML or LaTeX would read as markup."""

SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
MARKUP = (
    'a sign that says "$100_$" next to a "$200" note',
    r"\frac{$ \undefined $} 100 % & # ~ ^ \\",
    "_a_ *b* **c** `d` ~~e~~ ![f](g.png) [h](i) <b>j</b> &lt; k|l \\| m",
    "[red]x[/red] {y} 猫と犬 \U0001f600 \u0627\u0644",
    f"a\n- b\t{SEPARATORS} c",
)
