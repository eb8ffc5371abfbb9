// Drives a page in headless Chromium as a reader would, at three sizes, and tells in JSON what it
// saw: node drive.mjs page.html [folder for screenshots]
//
// CHROMIUM names the browser; without it, those of Debian and of others are looked for.

import { existsSync, mkdirSync } from "node:fs";
import { chromium } from "playwright-core";

const [page, shots] = process.argv.slice(2);
const found = [process.env.CHROMIUM, "/usr/bin/chromium", "/usr/bin/chromium-browser",
  "/usr/bin/google-chrome"].find((path) => path && existsSync(path));
const browser = await chromium.launch({ executablePath: found, args: ["--no-sandbox"] });
const seen = { errors: [], requests: [], sizes: {} };
if (shots) mkdirSync(shots, { recursive: true });

for (const [width, height] of [[1440, 900], [1024, 768], [390, 844]]) {
  const view = await browser.newPage({ viewport: { width, height } });
  view.on("pageerror", (error) => seen.errors.push(error.message));
  view.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) seen.errors.push(message.text());
  });
  view.on("request", (request) => {
    if (!/^(file|data):/.test(request.url())) seen.requests.push(request.url());
  });
  const told = {};
  seen.sizes[width] = told;
  const shot = async (name) => {
    if (shots) await view.screenshot({ path: `${shots}/${width}-${name}.png` });
  };
  const boxes = () => view.evaluate(() => window.plan.graph.view.nodes().length);
  const title = () => view.locator("#details-body h2").textContent();
  const chosen = () => view.locator('#tree [aria-selected="true"]').textContent();

  // Processor seconds of the page: a machine that others use too says little by the clock.
  const inside = await view.context().newCDPSession(view);
  await inside.send("Performance.enable", { timeDomain: "threadTicks" });
  await view.goto(`file://${page}`);
  await view.waitForSelector("body[data-ready]");
  const { metrics } = await inside.send("Performance.getMetrics");
  told.seconds = metrics.find(({ name }) => name === "TaskDuration").value;
  told.sideways = await view.evaluate(() => document.documentElement.scrollWidth > innerWidth);
  told.first = await boxes();
  await shot("graph");

  // Close and open by buttons, where there is room for them.
  if (width > 720) {
    await view.click("#close");
    told.closed = await boxes();
    told.redrawn = await view.evaluate(() => {
      const before = performance.now();
      document.getElementById("open").click();
      return Math.round(performance.now() - before);
    });
    told.opened = await boxes();
    await view.click("#close");
  }

  // Search, by keys alone.
  await view.keyboard.press("/");
  told.focus = await view.evaluate(() => document.activeElement.id);
  await view.keyboard.type("linear");
  told.found = await view.locator("#results li").count();
  told.status = await view.locator("#status").textContent();
  await shot("search");
  await view.keyboard.press("ArrowDown");
  await view.keyboard.press("Enter");
  told.chosen = await title();
  told.selected = await view.evaluate(() => window.plan.graph.view.$(".chosen").length);
  await shot("chosen");

  // A click on a box of the graph tells of it.
  const place = await view.evaluate(() => {
    const { graph } = window.plan;
    const box = graph.view.nodes(".op").filter((one) => !one.hasClass("chosen"))[0] ||
      graph.view.nodes(".op")[0];
    graph.view.zoom(1);
    graph.view.center(box);
    const { left, top } = document.getElementById("graph").getBoundingClientRect();
    const { x, y } = box.renderedPosition();
    return { x: left + x, y: top + y, id: box.id(), name: box.data("label").split("\n")[0] };
  });
  await view.mouse.click(place.x, place.y);
  await view.waitForTimeout(50);
  told.clicked = [(await title()).startsWith(place.name), place.name];
  told.facts = await view.locator("#details-body h3").allTextContents();

  // The tree by keys: down, close with left, open with right.
  if (width <= 720) await view.click("#modules");
  await view.locator('#tree [tabindex="0"]').focus();
  await view.keyboard.press("Home");
  const root = await chosen();
  await view.keyboard.press("ArrowDown");
  told.down = (await chosen()) !== root;
  const rows = () => view.locator("#tree li").count();
  const at = await view.evaluate(() => {
    const items = window.plan.tree.items;
    return items.findIndex(([one], place) => place && typeof one !== "number");
  });
  for (let step = 1; step < at; step++) await view.keyboard.press("ArrowDown");
  const some = await rows();
  await view.keyboard.press("Enter");
  const others = await rows();
  await view.keyboard.press("Enter");
  told.folded = some !== others && (await rows()) === some;
  await shot("tree");
  if (width <= 720) await view.click("#modules");

  // The graph by keys.
  await view.locator("#graph").focus();
  const zoom = () => view.evaluate(() => window.plan.graph.view.zoom());
  const pan = () => view.evaluate(() => window.plan.graph.view.pan().x);
  const [zoomed, panned] = [await zoom(), await pan()];
  await view.keyboard.press("+");
  told.zoomed = (await zoom()) > zoomed;
  await view.keyboard.press("-");
  await view.keyboard.press("ArrowRight");
  told.panned = (await pan()) < panned;
  await view.keyboard.press("n");
  told.next = await title();
  await view.keyboard.press("Escape");
  told.escaped = await view.evaluate(() => !document.body.classList.contains("chosen"));

  // Filters dim what they leave out.
  const dim = () => view.evaluate(() => window.plan.graph.view.nodes(".dim").length);
  await view.evaluate(() => { window.plan.model.setAll(true); });
  await view.selectOption("#phase", "update");
  told.dimmed = (await dim()) > 0;
  await view.selectOption("#phase", "");
  told.bright = (await dim()) === 0;

  // The other views, by the keys of tabs.
  await view.click("#tab-graph");
  for (const name of ["threads", "timeline", "memory"]) {
    await view.keyboard.press("ArrowRight");
    told[name] = await view.locator(`#panel-${name}`).evaluate((one) => !one.hidden);
    await view.waitForTimeout(60);
    await shot(name);
    if (name === "timeline") {
      const box = await view.locator("#timeline canvas").boundingBox();
      await view.mouse.click(box.x + box.width / 3, box.y + 45);
      told.event = await view.locator("#timeline .hover").textContent();
      await view.locator("#tab-timeline").focus();
    }
  }
  told.lanes = await view.locator("#threads svg .name").count();

  // Dark and light.
  const ground = () => view.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const light = await ground();
  await view.click("#theme");
  told.dressed = (await ground()) !== light;
  await view.click("#tab-graph");
  await shot("dark");
  // A click on a collective tells of it, if there is one.
  const sync = await view.evaluate(() => {
    const { graph, model, tree } = window.plan;
    const number = model.data.elements.findIndex((one) => one.k === "sync");
    if (number < 0) return null;
    model.reveal(model.twin(number));
    graph.draw(false);
    tree.draw();
    const box = graph.view.$(`#e${model.twin(number)}`);
    graph.view.zoom(1);
    graph.view.center(box);
    const { left, top } = document.getElementById("graph").getBoundingClientRect();
    const { x, y } = box.renderedPosition();
    return { x: left + x, y: top + y };
  });
  told.collective = null;
  if (sync) {
    await view.mouse.click(sync.x, sync.y);
    await view.waitForTimeout(50);
    told.collective = await view.locator("#details-body h3").allTextContents();
    await shot("collective");
  }

  // Buttons and fields have names, and what is hidden to the eye is not to the ear.
  told.nameless = await view.evaluate(() =>
    [...document.querySelectorAll("button, input, select, [role=img]")].filter((one) =>
      !(one.textContent.trim() || one.getAttribute("aria-label") || one.labels?.length)).length);
  await view.close();
}
await browser.close();
console.log(JSON.stringify(seen));
