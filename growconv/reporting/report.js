for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("button").forEach((button, column) => {
    let up = false;
    button.addEventListener("click", () => {
      up = !up;
      const scale = { k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15 };
      const value = (row) => {
        const text = row.cells[column].textContent;
        const found = text.replaceAll(",", "").match(/^([-+]?[\d.]+(?:e[-+]?\d+)?)(?: ([kMGTP]))?/);
        return found ? Number(found[1]) * (scale[found[2]] ?? 1) : text;
      };
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      button.parentElement.setAttribute("aria-sort", up ? "ascending" : "descending");
    });
  });
}
