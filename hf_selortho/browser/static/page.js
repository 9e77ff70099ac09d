// Addresses of the views: links and buttons of the page change the query, and the query says what is shown.
window.selortho = (() => {
  const VIEWS = [
    "start", "text", "features", "feature", "concepts", "pairs", "search", "steer", "compare", "run", "graph",
  ];
  let ask = null; // hands a query to the server
  let waiting = null; // a query from before the page was connected

  function viewOf(query) {
    const fields = new URLSearchParams(query);
    const view = fields.get("view") || (fields.get("q") ? "text" : "start");
    if (view === "pair" || (view === "feature" && !fields.get("id"))) return view + "s";
    return VIEWS.includes(view) ? view : "start";
  }

  function show(query) {
    const view = viewOf(query);
    document.body.dataset.view = view;
    document.querySelectorAll("#so-nav a").forEach((link) => {
      if (link.dataset.view === (view === "feature" ? "features" : view)) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    });
    const sae = new URLSearchParams(query).get("sae") || "main";
    document.querySelectorAll(".so-switch button").forEach((button) => {
      button.setAttribute("aria-pressed", (button.dataset.set.split("=")[1] || "main") === sae ? "true" : "false");
    });
  }

  function busy(on) {
    document.body.toggleAttribute("data-busy", on);
    const shown = document.querySelector("#so-view-" + document.body.dataset.view);
    if (shown) shown.setAttribute("aria-busy", on ? "true" : "false");
  }

  function go(query, push = true) {
    const moved = viewOf(query) !== document.body.dataset.view;
    if (push && query !== location.search) history.pushState({}, "", query);
    show(query);
    if (moved) window.scrollTo({ top: 0 });
    busy(true);
    if (ask) ask(query);
    else waiting = query;
  }

  // Changes of the current address: {q: "a text", token: null}; null and "" remove.
  function set(changes, view) {
    const query = new URLSearchParams(location.search);
    if (view) query.set("view", view);
    else if (!query.get("view")) query.set("view", document.body.dataset.view || "start");
    for (const [name, value] of Object.entries(changes)) {
      if (value === null || value === undefined || value === "") query.delete(name);
      else query.set(name, value);
    }
    go("?" + query.toString());
  }

  // The server has answered: the address as it understood it, and the title.
  function done() {
    busy(false);
    const shown = document.querySelector("#so-view-" + document.body.dataset.view + " [data-address]");
    if (!shown) return;
    if (viewOf(shown.dataset.address) === document.body.dataset.view) {
      history.replaceState({}, "", shown.dataset.address);
    }
    document.title = shown.dataset.title + " · hf_selortho";
    const chosen = shown.querySelector(".so-graph .so-chosen"); // on a narrow screen, where it can be seen
    if (!chosen) return;
    const graph = chosen.closest(".so-graph");
    graph.scrollLeft += chosen.getBoundingClientRect().left - graph.getBoundingClientRect().left - graph.clientWidth / 2;
  }

  function connect(send) {
    ask = send;
    show(location.search); // the navigation is there by now
    if (waiting !== null) ask(waiting);
    waiting = null;
  }

  document.addEventListener("click", (event) => {
    if (event.defaultPrevented || event.button !== 0 || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    const link = event.target.closest("a[href^='?']");
    if (link) {
      event.preventDefault();
      go(link.getAttribute("href"));
      return;
    }
    const button = event.target.closest("[data-set]");
    if (button) {
      const [name, value] = button.dataset.set.split("=");
      set({ [name]: value });
    }
  });

  // A form within a view: what its fields say becomes the address, from the first page on.
  document.addEventListener("submit", (event) => {
    const form = event.target.closest("form[data-view]");
    if (!form) return;
    event.preventDefault();
    set({ page: "", ...Object.fromEntries(new FormData(form)) }, form.dataset.view);
  });

  // Bars of a histogram that are dragged over: from the lowest to the highest of them. A bar alone is a link.
  let brushed = null; // the bar where the drag began, and whether it has reached another one
  const bars = () => [...document.querySelectorAll("#so-view-" + document.body.dataset.view + " [data-low]")];
  const barAt = (event) => {
    const under = document.elementFromPoint(event.clientX, event.clientY);
    return under && under.closest("[data-low]");
  };
  const between = (a, b) => {
    const all = bars();
    const [first, last] = [all.indexOf(a), all.indexOf(b)].sort((x, y) => x - y);
    return all.slice(first, last + 1);
  };
  document.addEventListener("pointerdown", (event) => {
    const bar = event.button === 0 && event.target.closest("[data-low]");
    brushed = bar ? { bar, end: bar } : null;
  });
  document.addEventListener("pointermove", (event) => {
    const bar = brushed && barAt(event);
    if (!bar || bar === brushed.end) return;
    brushed.end = bar;
    brushed.moved = true;
    const within = between(brushed.bar, bar);
    bars().forEach((one) => one.classList.toggle("so-within", within.includes(one)));
  });
  document.addEventListener("pointerup", () => {
    const drag = brushed;
    brushed = null;
    if (!drag || !drag.moved) return;
    const within = between(drag.bar, drag.end);
    set({ low: within[0].dataset.low, high: within[within.length - 1].dataset.high, page: "" });
    const swallow = (event) => event.preventDefault(); // the click that ends the drag
    document.addEventListener("click", swallow, { capture: true, once: true });
    setTimeout(() => document.removeEventListener("click", swallow, { capture: true }), 0);
  });
  document.addEventListener("pointercancel", () => (brushed = null));
  document.addEventListener("dragstart", (event) => {
    if (event.target.closest && event.target.closest("[data-low]")) event.preventDefault();
  });
  window.addEventListener("popstate", () => go(location.search, false));
  const start = () => show(location.search);
  if (document.body) start();
  else document.addEventListener("DOMContentLoaded", start);
  return { go, set, done, connect, show };
})();
