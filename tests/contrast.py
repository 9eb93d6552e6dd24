"""The contrast of a page's text, as WCAG 2.2 defines it."""

FAINT = """texts => {
  const luminance = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(c => c / 255);
    const [x, y, z] = [r, g, b].map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * x + .7152 * y + .0722 * z;
  };
  const under = one => getComputedStyle(one).backgroundColor;
  const contrast = one => {
    let behind = one;
    while (under(behind) === "rgba(0, 0, 0, 0)") behind = behind.parentNode;
    const [a, b] = [getComputedStyle(one).color, under(behind)].map(luminance);
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  };
  return texts.filter(one => contrast(one) < 4.5).map(one => one.outerHTML);
}"""
"""Of elements, those whose contrast is less than is asked of text: to be evaluated on all of a locator."""
