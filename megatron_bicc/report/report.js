"use strict";
// Step selector of the packed layouts, and the group browser. Texts of a run are only ever inserted as text nodes.
(() => {
  const byId = (id) => document.getElementById(id);

  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function chooseLayout() {
    const chooser = byId("layout-step");
    if (!chooser) return;
    const show = () => {
      for (const layout of document.querySelectorAll("[data-layout]")) {
        layout.hidden = layout.dataset.layout !== chooser.value;
      }
    };
    chooser.addEventListener("change", show);
    show();
  }

  function browseGroups() {
    const source = byId("group-data");
    if (!source) return;
    const { groups, runs } = JSON.parse(source.textContent);
    const [search, list, detail, status] = ["search", "group-list", "group", "group-count"].map(byId);
    const filters = ["run", "step", "outcome", "side"].map((name) => byId(`filter-${name}`));
    const [run, step, outcome, side] = filters;
    const outcomes = { right: "all right", mixed: "right and wrong", wrong: "all wrong" };
    let matching = [];
    let chosen = -1;

    function fillChoices() {
      runs.forEach((name, i) => run.append(element("option", { value: i }, name)));
      run.parentElement.hidden = runs.length < 2;
      const steps = [...new Set(groups.map((group) => group.step))].sort((a, b) => a - b);
      for (const number of steps) step.append(element("option", { value: number }, `${number}`));
    }

    function matches(group) {
      return (
        (run.value === "" || group.run === Number(run.value)) &&
        (step.value === "" || group.step === Number(step.value)) &&
        (outcome.value === "" || group.outcome === outcome.value) &&
        group.prompt.toLowerCase().includes(search.value.trim().toLowerCase())
      );
    }

    function option(group, i) {
      const where = runs.length > 1 ? `${runs[group.run]}, step ${group.step}` : `step ${group.step}`;
      const counts = `${group.right} right, ${group.wrong} wrong`;
      const about = element("span", { class: "about" }, element("span", {}, where), element("span", {}, counts));
      const excerpt = element("span", { class: "excerpt" }, group.prompt.slice(0, 120));
      const made = element("div", { role: "option", id: `group-${i}`, "aria-selected": "false" }, excerpt, about);
      made.addEventListener("click", () => choose(i));
      return made;
    }

    function filter() {
      matching = groups.filter(matches);
      list.replaceChildren(...matching.map(option));
      list.removeAttribute("aria-activedescendant");
      const shown = groups.length === matching.length ? "" : ` of ${groups.length}`;
      status.textContent = `${matching.length}${shown} group${groups.length === 1 ? "" : "s"}`;
      chosen = -1;
      if (matching.length) choose(0);
      else detail.replaceChildren(element("p", { class: "soft" }, "No group matches. Press Escape to clear the search."));
    }

    function choose(i) {
      list.children[chosen]?.setAttribute("aria-selected", "false");
      chosen = Math.max(0, Math.min(i, matching.length - 1));
      const now = list.children[chosen];
      now.setAttribute("aria-selected", "true");
      list.setAttribute("aria-activedescendant", now.id);
      // Not scrollIntoView, which would scroll the page too.
      if (now.offsetTop < list.scrollTop) list.scrollTop = now.offsetTop;
      const below = now.offsetTop + now.offsetHeight - list.clientHeight;
      if (below > list.scrollTop) list.scrollTop = below;
      show(matching[chosen]);
    }

    function show(group) {
      const where = runs.length > 1 ? `${runs[group.run]}, step ${group.step}` : `Step ${group.step}`;
      const shown = [
        element("h3", {}, `${where}: ${outcomes[group.outcome]}`),
        element("p", { class: "soft" }, `expected answer: ${group.truth}`),
        element("pre", {}, ...highlighted(group.prompt)),
        element("div", { class: "sides" }, ...["right", "wrong"].map((label) => sideOf(group, label)).filter(Boolean)),
      ];
      detail.replaceChildren(...shown);
      for (const text of detail.querySelectorAll("pre")) makeReachable(text);
    }

    function highlighted(text) {
      const [wanted, lower] = [search.value.trim().toLowerCase(), text.toLowerCase()];
      // A few letters change length in lower case; offsets in the two texts would then differ.
      if (!wanted || lower.length !== text.length) return [text];
      const parts = [];
      let from = 0;
      for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, from)) {
        parts.push(text.slice(from, at), element("mark", {}, text.slice(at, at + wanted.length)));
        from = at + wanted.length;
      }
      return [...parts, text.slice(from)];
    }

    function sideOf(group, label) {
      const rollouts = group.rollouts.filter((rollout) => rollout.correct === (label === "right"));
      if (!rollouts.length || (side.value !== "" && side.value !== label)) return null;
      const made = element("section", { class: `side ${label}` }, element("h4", {}, `${group[label]} ${label}`));
      const contexts = new Set(rollouts.map((rollout) => rollout.context));
      if (contexts.size === 1) made.append(contextOf(group, rollouts[0]));
      for (const rollout of rollouts) {
        const times = rollout.count > 1 ? `${rollout.count} identical: ` : "";
        made.append(element("p", { class: "soft" }, `${times}reward ${rollout.reward}, advantage ${rollout.advantage}`));
        made.append(rollout.text ? element("pre", {}, rollout.text) : element("p", {}, "(empty response)"));
        if (contexts.size > 1) made.append(contextOf(group, rollout));
      }
      return made;
    }

    function contextOf(group, rollout) {
      const context = group.contexts[rollout.context].replace(/^\n+|\n+$/g, "");
      if (group.outcome !== "mixed") return element("p", { class: "soft" }, "No contrast: the advantages are 0.");
      if (!context) return element("p", { class: "soft" }, "Trained without a context.");
      const summary = element("summary", {}, "Trained with this context");
      return element("details", { open: "" }, summary, element("pre", { class: "context" }, context));
    }

    function makeReachable(text) {
      if (text.scrollHeight <= text.clientHeight) return;
      text.tabIndex = 0;
      text.setAttribute("role", "region");
      text.setAttribute("aria-label", "Long text, scrollable");
    }

    function clearSearch() {
      search.value = "";
      filter();
    }

    const moves = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, Home: -Infinity, End: Infinity };

    function onKey(event) {
      if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "SELECT") return;
      const typing = event.target === search;
      if (event.key === "Escape") clearSearch();
      else if (event.key === "/" && !typing) search.focus();
      else if (event.key in moves && isOurs(event, typing) && matching.length) choose(chosen + moves[event.key]);
      else return;
      event.preventDefault();
    }

    // In the search field letters are typed; outside the list arrow keys scroll the page.
    function isOurs(event, typing) {
      if (event.key === "j" || event.key === "k") return !typing;
      if (event.key === "Home" || event.key === "End") return event.target === list;
      return typing || event.target === list;
    }

    fillChoices();
    search.addEventListener("input", filter);
    for (const each of filters) each.addEventListener("change", filter);
    byId("groups").addEventListener("keydown", onKey);
    filter();
  }

  chooseLayout();
  browseGroups();
})();
