// Takes screenshots of a page at three sizes: node look.mjs page.html folder
import { chromium } from "playwright-core";
const [page, folder] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: ["--no-sandbox"] });
for (const [width, height] of [[1440, 900], [1024, 768], [390, 844]]) {
  const view = await browser.newPage({ viewport: { width, height } });
  view.on("pageerror", (error) => console.log("ERROR", error.message));
  view.on("console", (m) => m.type() === "error" && console.log("console", m.text()));
  const start = Date.now();
  await view.goto(`file://${page}`);
  await view.waitForSelector("body[data-ready]");
  console.log(width, Date.now() - start, "ms");
  await view.waitForTimeout(300);
  await view.screenshot({ path: `${folder}/${width}.png` });
  if (width === 1440) {
    for (const tab of ["threads", "timeline", "memory"]) {
      await view.click(`#tab-${tab}`);
      await view.waitForTimeout(200);
      await view.screenshot({ path: `${folder}/${tab}.png` });
    }
    await view.click("#tab-graph");
    await view.click("#theme");
    await view.fill("#search", "all-gather");
    await view.waitForTimeout(100);
    await view.screenshot({ path: `${folder}/search.png` });
    await view.keyboard.press("Enter");
    await view.waitForTimeout(200);
    await view.screenshot({ path: `${folder}/chosen.png` });
  }
  await view.close();
}
await browser.close();
